"""The proof of a conversion: DEST holds exactly what SOURCE must become, every weight of it and nothing else.

What each tensor must become is worked out anew from the source, in the dtype that DEST has, and compared byte for byte.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from .. import names
from ..checkpoint import Checkpoint
from ..dtypes import DType, Floats
from ..errors import UsageError, in_file
from ..fill import default_threads
from ..formats.imatrix import read_imatrix
from ..formats.meta import DEFAULTS, MetaOptions
from ..importance import of_the_head
from ..layout import PlacedTensor
from ..provenance import spelled
from ..recognise import open as open_checkpoint
from ..tensors import Cast, Concat, LazyTensor
from .finding import Finding
from .hub import as_bytes, hub, row_ranges, same_bytes, with_divisors
from .reasons import reason, wrongly_joined

BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # of old Hugging Face checkpoints
IMATRIX_KEY = "quantize.imatrix.file"
EMBEDDING, OUTPUT = (names.MODEL_TENSORS[name] for name in (names.EMBEDDING, names.OUTPUT))

OnProgress = Callable[[int, int], object]  # bytes done, bytes in all
Bytes = NDArray[np.uint8]  # of a row
Candidates = list[tuple[str, LazyTensor]]  # (how, what a tensor may become)


@dataclass(frozen=True)
class Proof:
    """What was found of DEST.

    how: what made each proven tensor of its source. accounted: what became of the source's tensors, with the number of
    tensors and of weights; numbers in buffers are no weights. derived: tensors that follow from hyperparameters.
    findings: what contradicts.
    """

    dest: str
    source: str
    how: Mapping[str, str]
    accounted: Mapping[str, tuple[int, int]]
    derived: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = field(default=())

    @property
    def proven(self) -> bool:
        return not self.findings


def prove(
    dest: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    imatrix: str | os.PathLike[str] | None = None,
    options: MetaOptions = DEFAULTS,
    threads: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Proof:
    """Holds the tensors of `dest` against those that `source` must become.

    Quantized tensors must be what exact rounding gives, or, with an imatrix, exact or search rounding. options: what to
    state about a Meta source. Metadata are not compared. Raises what `open` and reading raise.
    """
    made, origin = open_checkpoint(dest), open_checkpoint(source, options)
    ours, theirs = hub(made).tensors, dict(with_divisors(origin, hub(origin)).tensors)
    if origin.scheme == "hf" and origin.hparams is None:
        raise UsageError(f"there is no config.json beside {source}, which tells the order of rows", where="--against")
    buffers = {name: theirs.pop(name) for name in list(theirs) if BUFFERS.fullmatch(name)}
    tied = _tied(ours, theirs)
    weigh = _Weigher.of({} if imatrix is None else read_imatrix(imatrix).importance, theirs, set(tied))
    total, done, lock = sum(tensor.nbytes for tensor in ours.values()), 0, Lock()

    def hold(name: str) -> str | Finding:
        nonlocal done
        found = _Trial(str(dest), made, theirs, weigh, origin.hparams.head_dim if origin.hparams else None).of(
            name, ours[name]
        )
        with lock:
            done += ours[name].nbytes
            on_progress(done, total)
        return found

    common = sorted((name for name in ours if name in theirs), key=lambda name: -ours[name].n_weights)
    with in_file(source), ThreadPoolExecutor(threads or default_threads()) as pool:
        results = dict(zip(common, pool.map(hold, common), strict=True))
    findings = [result for name in ours if isinstance(result := results.get(name), Finding)]
    findings += _uncovered(str(dest), ours, theirs, set(tied))
    derived = () if origin.scheme == "gguf" else tuple(n for n in (names.ROPE_FACTORS,) if n in results)
    became = [theirs[name] for name in common if name not in derived]
    accounted = {
        "became tensors": _counted(became),
        "equal to the embedding, left out": _counted(tied.values()),
        "buffers, left out": (len(buffers) + len(origin.dropped), 0),
        "lost": _counted(t for name, t in theirs.items() if name not in ours and name not in tied),
    }
    how = {name: result for name in ours if isinstance(result := results.get(name), str)}
    return Proof(str(dest), str(source), how, accounted, derived, tuple(findings))


def _counted(tensors: Iterable[LazyTensor]) -> tuple[int, int]:
    n_weights = [tensor.n_weights for tensor in tensors]
    return len(n_weights), sum(n_weights)


def _tied(ours: Mapping[str, LazyTensor], theirs: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The source's output matrix, where it equals the embedding and the file has none."""
    if OUTPUT in ours or OUTPUT not in theirs or EMBEDDING not in theirs:
        return {}
    return {OUTPUT: theirs[OUTPUT]} if same_bytes(theirs[OUTPUT], theirs[EMBEDDING]) else {}


def _uncovered(
    dest: str, ours: Mapping[str, LazyTensor], theirs: Mapping[str, LazyTensor], tied: set[str]
) -> Iterator[Finding]:
    remedy = "It is not of this source, or lost on the way"
    for name, tensor in ours.items():
        if name not in theirs:
            what = f"{tensor.dtype} {spelled(tensor.shape)}, of which the source has nothing"
            yield Finding("not-in-source", what, dest, f"tensor {name!r}", remedy="It is of another model")
    for name, tensor in theirs.items():
        if name not in ours and name not in tied:
            what = f"the source has it as {tensor.dtype} {spelled(tensor.shape)}, and this file does not"
            yield Finding("not-in-file", what, dest, f"tensor {name!r}", remedy=remedy)


@dataclass(frozen=True)
class _Weigher:
    """What a tensor may become in a dtype, by the importances of an imatrix; a search derives the head's."""

    importance: Mapping[str, Floats]
    derived: Mapping[str, Floats]

    @classmethod
    def of(cls, importance: Mapping[str, Floats], source: Mapping[str, LazyTensor], left_out: set[str]) -> _Weigher:
        placed = [
            PlacedTensor(name, tensor.dtype, tensor.shape, 0, tensor.nbytes, source=tensor)
            for name, tensor in source.items()
            if name not in left_out
        ]
        return cls(importance, of_the_head(importance, placed) if importance else {})

    def candidates(self, name: str, tensor: LazyTensor, dtype: DType) -> Candidates:
        """Ways to make `dtype` of a tensor, the likeliest first; none where llamatools cannot."""
        if tensor.dtype is dtype:
            return [("copied", tensor)]
        if tensor.dtype.decode is None or dtype.encode is None:
            return []
        change = f"{tensor.dtype} to {dtype}"
        plain: Candidates = [(f"{change}, exact rounding", Cast(tensor, dtype))]
        weights = self.importance.get(name)
        if dtype.search is not None and name in self.derived:
            how = f"{change}, search rounding by the head's derived importance"
            return [*plain, (how, Cast(tensor, dtype, self.derived[name], dtype.search))]
        if weights is None or not dtype.is_quantized:
            return plain
        if len(weights) != tensor.shape[-1] * math.prod(tensor.shape[:-2]):
            return plain  # as llama.cpp does for an embedding
        ways: Candidates = [(f"{change}, exact rounding by the imatrix", Cast(tensor, dtype, weights))]
        if dtype.search is not None:
            ways.append((f"{change}, search rounding by the imatrix", Cast(tensor, dtype, weights, dtype.search)))
        return ways + plain


@dataclass(frozen=True)
class _Trial:
    """The tensors of a file held against a source, one at a time."""

    file: str
    made: Checkpoint
    source: Mapping[str, LazyTensor]
    weigh: _Weigher
    head_dim: int | None

    def of(self, name: str, tensor: LazyTensor) -> str | Finding:
        """How the tensor was made of its source, or what is wrong with it."""
        own, where = self.source[name], f"tensor {name!r}"
        if tensor.shape != own.shape:
            return Finding("unlike-source", self._shape(tensor, own), self.file, where, remedy="Convert it anew")
        candidates = self.weigh.candidates(name, own, tensor.dtype)
        if not candidates:
            what = f"{own.dtype} of the source cannot be made {tensor.dtype} here, so that nothing can be compared"
            return Finding("unproven", what, self.file, where, remedy="Use --diff, which tells how far they are apart")
        how, account = _compared(tensor, candidates)
        if account is None:
            return how
        why = reason(name, tensor, self.source, lambda n, t: self._all(n, t, tensor.dtype), self.head_dim)
        lacks_imatrix = not self.weigh.importance and IMATRIX_KEY in self.made.metadata
        if why is None and tensor.dtype.is_quantized and lacks_imatrix:
            what = f"{account}; it was quantized with an imatrix, which is not given"
            return Finding("unproven", what, self.file, where, remedy="Name the imatrix with --imatrix")
        what = f"{account}: {why}" if why else account
        return Finding("unlike-source", what, self.file, where, remedy="Convert it anew")

    def _all(self, name: str, tensor: LazyTensor, dtype: DType) -> list[LazyTensor]:
        return [made for _, made in self.weigh.candidates(name, tensor, dtype)]

    def _shape(self, tensor: LazyTensor, own: LazyTensor) -> str:
        what = f"shape {spelled(tensor.shape)}, where the source makes {spelled(own.shape)}"
        if isinstance(own, Concat) and len(own.shape) == 2 and wrongly_joined(own).shape == tensor.shape:
            return f"{what}: its {len(own.parts)} shards were joined along the wrong axis"
        return what


def _compared(tensor: LazyTensor, candidates: Candidates) -> tuple[str, str | None]:
    """The first candidate that the tensor equals, and None; or the one that it equals longest, and the difference."""
    alive, differing, first = list(candidates), 0, ""
    for start, stop in row_ranges(tensor):
        got = as_bytes(tensor.read(start, stop))
        due = [as_bytes(made.read(start, stop)) for _, made in alive]
        equal = [candidate for candidate, rows in zip(alive, due, strict=True) if np.array_equal(got, rows)]
        if equal and not differing:
            alive = equal
        elif not equal:
            alive = alive[:1]
            unequal = (got != due[0]).reshape(len(got), -1, tensor.dtype.block_nbytes).any(-1)  # (rows, blocks)
            if not differing:
                row, block = divmod(int(np.flatnonzero(unequal)[0]), unequal.shape[1])
                first = f"row {start + row}, {_place(tensor, block, got[row], due[0][row])}"
            differing += int(unequal.sum())
    if not differing:
        return alive[0][0], None
    n = tensor.n_rows * (tensor.row_length // tensor.dtype.block_size)
    units = "blocks" if tensor.dtype.is_quantized else "weights"
    return alive[0][0], f"{first}; {differing} of its {n} {units} differ"


def _place(tensor: LazyTensor, block: int, got: Bytes, due: Bytes) -> str:
    """Column or block of a row, and what stands there in both, as hexadecimal number."""
    size = tensor.dtype.block_nbytes
    cut = slice(block * size, (block + 1) * size)
    if tensor.dtype.is_quantized:
        width = tensor.dtype.block_size
        return f"block {block} (columns {block * width} to {(block + 1) * width}) is not what the source makes"
    is_now, was = (f"0x{bytes(row[cut])[::-1].hex()}" for row in (got, due))
    return f"column {block} is {is_now}, where the source makes {was}"
