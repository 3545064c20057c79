"""Two models side by side: hyperparameters, tokenizer, metadata, and every tensor, worst first.

Tensors are matched by name and row order whatever scheme each model has (see `hub`), and read by ranges of rows.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

import numpy as np

from .. import names
from ..checkpoint import Checkpoint
from ..dtypes import Floats
from ..errors import in_file, printable
from ..fill import default_threads
from ..formats.meta import DEFAULTS, MetaOptions
from ..metadata import Kind, Value
from ..provenance import PREFIX, spelled
from ..recognise import open as open_checkpoint
from ..tensors import LazyTensor, read_floats
from .hub import HeadRows, Hub, hub, is_rotated, row_ranges, same_bytes, with_divisors

Verdict = Literal["same bytes", "same values", "different", "only in A", "only in B"]
OnProgress = Callable[[int, int], object]  # bytes done, bytes in all

# Keys of a GGUF that say how it is stored, or that hyperparameters and tokenizer say.
PASSED_OVER = (
    PREFIX, "split.", "general.alignment", "general.file_type", "general.quantization_version", "quantize.imatrix.",
    "tokenizer.", "llama.", "config.",
)  # fmt: skip
SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of two models. name: GGUF's. how: what tells the two apart, or in what they agree.

    error: the root mean square of B - A relative to that of A; None where weights were not compared.
    """

    name: str
    verdict: Verdict
    how: str
    error: float | None = None


@dataclass(frozen=True)
class Difference:
    """Two models compared. tensors: the worst first. fields: (what, in A, in B) of what else differs.

    not_compared: what could not be, and why.
    """

    a: str
    b: str
    tensors: tuple[TensorDifference, ...]
    fields: tuple[tuple[str, str, str], ...]
    not_compared: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether all weights have the same values, and nothing else differs."""
        return not self.fields and all(tensor.verdict.startswith("same") for tensor in self.tensors)


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    options: MetaOptions = DEFAULTS,
    threads: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Difference:
    """Compares two models in any formats that `open` reads.

    options: what to state about Meta folders. Raises what `open` and reading raise.
    """
    one, other = open_checkpoint(a, options), open_checkpoint(b, options)
    hubs = with_divisors(one, hub(one)), with_divisors(other, hub(other))
    ours, theirs = (h.tensors for h in hubs)
    common = [name for name in ours if name in theirs]
    total, done, lock = sum(ours[name].nbytes for name in common), 0, Lock()

    def compare(name: str) -> TensorDifference:
        nonlocal done
        reordered = [_reordered(checkpoint, h, name) for checkpoint, h in ((one, hubs[0]), (other, hubs[1]))]
        head_dim = next((c.hparams.head_dim for c in (one, other) if c.hparams), None)
        found = compared(name, ours[name], theirs[name], head_dim, order_differs=reordered[0] != reordered[1])
        with lock:
            done += ours[name].nbytes
            on_progress(done, total)
        return found

    largest_first = sorted(common, key=lambda name: -ours[name].nbytes)
    with in_file(a), ThreadPoolExecutor(threads or default_threads()) as pool:
        found = list(pool.map(compare, largest_first))
        found += [_alone(name, ours, "only in A") for name in ours if name not in theirs]
        found += [_alone(name, theirs, "only in B") for name in theirs if name not in ours]
    order = {name: n for n, name in enumerate(dict.fromkeys((*ours, *theirs)))}
    found.sort(key=lambda tensor: (-_badness(tensor), order[tensor.name]))
    fields = [*_hparams(one, other), *_tokenizers(one, other)]
    not_compared = []
    for what in ("hparams", "tokenizer"):
        lacking = [str(c.path) for c in (one, other) if getattr(c, what) is None]
        if lacking:
            label = "hyperparameters" if what == "hparams" else what
            not_compared.append(f"{label}: {' and '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} none")
    if one.scheme == other.scheme == "gguf":
        fields += _keys(one, other)
    else:
        not_compared.append("other metadata: each format has keys of its own")
    not_compared += [
        f"the order of rows of {len(h.unordered)} q and k tensors of {c.path}: there is no config.json beside it"
        for c, h in ((one, hubs[0]), (other, hubs[1]))
        if h.unordered
    ]
    return Difference(str(a), str(b), tuple(found), tuple(fields), tuple(not_compared))


def compared(
    name: str, a: LazyTensor, b: LazyTensor, head_dim: int | None = None, *, order_differs: bool = False
) -> TensorDifference:
    """Two tensors of one name. order_differs: they lie in their files in different orders of rows."""
    if a.shape != b.shape:
        return TensorDifference(name, "different", f"shape {spelled(a.shape)} and {spelled(b.shape)}")
    dtypes = f"{a.dtype}" if a.dtype is b.dtype else f"{a.dtype} and {b.dtype}"
    order = ", rows in Meta's and in Hugging Face's order" if order_differs else ""
    if same_bytes(a, b):
        return TensorDifference(name, "same values" if order else "same bytes", dtypes + order)
    if a.dtype.decode is None or b.dtype.decode is None:
        return TensorDifference(name, "different", f"{dtypes}, whose weights are not decoded here")
    error = _relative_error(a, b)
    if error == 0:
        return TensorDifference(name, "same values", dtypes + order, 0.0)
    if head_dim and is_rotated(name) and a.n_rows % head_dim == 0:
        for to_meta, which in ((True, "B"), (False, "A")):
            if _relative_error(a, HeadRows(b, head_dim, to_meta=to_meta)) == 0:
                how = f"{dtypes}, but the rows of {which} are in Hugging Face's order, where Meta's is due"
                return TensorDifference(name, "different", how, error)
    return TensorDifference(name, "different", dtypes, error)


def _relative_error(a: LazyTensor, b: LazyTensor) -> float:
    """The root mean square of b - a relative to that of a; 0 only where all values are equal, NaN being NaN."""
    squares, total, equal = 0.0, 0.0, True
    for rows in row_ranges(a):
        x, y = read_floats(a, *rows), read_floats(b, *rows)
        if not np.array_equal(x, y, equal_nan=True):
            equal = False
            squares += _sum_of_squares(y - x)
        total += _sum_of_squares(x)
    if equal:
        return 0.0
    return math.sqrt(squares / total) if total else math.inf


def _sum_of_squares(values: Floats) -> float:
    flat = values.ravel().astype(np.float64)
    return float(flat @ flat)


def _badness(tensor: TensorDifference) -> float:
    if tensor.verdict.startswith("same"):
        return -1.0 if tensor.verdict == "same bytes" else -0.5
    return math.inf if tensor.error is None or math.isnan(tensor.error) else tensor.error


def _reordered(checkpoint: Checkpoint, h: Hub, name: str) -> bool:
    return checkpoint.scheme == "hf" and is_rotated(name) and name not in h.unordered


def _alone(name: str, tensors: Mapping[str, LazyTensor], verdict: Verdict) -> TensorDifference:
    """A tensor that one model has; an output matrix that equals the embedding is nothing that the other lacks."""
    tensor = tensors[name]
    how = f"{tensor.dtype} {spelled(tensor.shape)}"
    if name == names.MODEL_TENSORS[names.OUTPUT]:
        embedding = tensors.get(names.MODEL_TENSORS[names.EMBEDDING])
        if embedding is not None and same_bytes(tensor, embedding):
            return TensorDifference(name, "same values", f"{how}, equal to the embedding; {verdict}", 0.0)
    return TensorDifference(name, verdict, how)


def _hparams(a: Checkpoint, b: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """rope_scaling is passed over, since a GGUF has its effect as a tensor, which is compared."""
    if a.hparams is None or b.hparams is None:
        return
    for field in dataclasses.fields(a.hparams):
        x, y = getattr(a.hparams, field.name), getattr(b.hparams, field.name)
        if isinstance(x, float) and isinstance(y, float):
            x, y = float(np.float32(x)), float(np.float32(y))
        if field.name != "rope_scaling" and x != y:
            yield field.name, f"{x:g}" if isinstance(x, float) else f"{x}", f"{y:g}" if isinstance(y, float) else f"{y}"


def _tokenizers(a: Checkpoint, b: Checkpoint) -> Iterator[tuple[str, str, str]]:
    if a.tokenizer is None or b.tokenizer is None:
        return
    for field in dataclasses.fields(a.tokenizer):
        x, y = getattr(a.tokenizer, field.name), getattr(b.tokenizer, field.name)
        yield from _values(f"tokenizer {field.name}", x, y)


def _values(what: str, x: Any, y: Any) -> Iterator[tuple[str, str, str]]:
    if _is_list(x) and _is_list(y):
        if len(x) != len(y):
            yield f"{what}, number", str(len(x)), str(len(y))
        first = next((n for n, (i, j) in enumerate(zip(x, y, strict=False)) if i != j), None)
        if first is not None:
            yield f"{what}, item {first}", _short(x[first]), _short(y[first])
    elif isinstance(x, Mapping) and isinstance(y, Mapping):
        for key in dict.fromkeys((*x, *y)):
            yield from _values(f"{what} {key}", x.get(key), y.get(key))
    elif _is_list(x) != _is_list(y) or x != y:
        yield what, _short(x), _short(y)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)


def _short(value: Any) -> str:
    text = "none" if value is None else printable(repr(value) if isinstance(value, str) else str(value))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _keys(a: Checkpoint, b: Checkpoint) -> Iterator[tuple[str, str, str]]:
    for key in dict.fromkeys((*a.metadata, *b.metadata)):
        if not key.startswith(PASSED_OVER):
            x, y = a.metadata.get(key), b.metadata.get(key)
            if x is None or y is None or x.kind is not y.kind:
                yield printable(key), _shown(x), _shown(y)
            else:
                yield from _values(printable(key), x.data, y.data)


def _shown(value: Value | None) -> str:
    if value is None:
        return "none"
    return f"{value.item}[{len(value.data)}]" if value.kind is Kind.ARRAY else f"{value.kind} {_short(value.data)}"
