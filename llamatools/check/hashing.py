"""SHA-256 of each tensor, of the metadata and of the model's weights, held against the digests stored in the file.

What exactly is hashed stands in docs/reference/digests.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock, local

import numpy as np

from .. import names, provenance
from ..checkpoint import Checkpoint
from ..dtypes import BF16, F16, F32
from ..errors import in_file, printable
from ..fill import default_threads
from ..formats.gguf_write import encode_key
from ..formats.meta import DEFAULTS, MetaOptions
from ..metadata import Metadata
from ..recognise import open as open_checkpoint
from ..tensors import Cast, FileTensor, LazyTensor
from .finding import Finding
from .hub import HeadRows, Hub, hub, row_ranges

# Keys that describe the file and not the model.
OF_THE_FILE = ("general.alignment", "split.", provenance.PREFIX)

PIECE = 1 << 20  # bytes hashed at once, read into the same memory again and again


class _Memory(local):
    """Where a thread reads to. Fresh memory for each tensor would cost its page faults again and again."""

    def __init__(self) -> None:
        self.piece = memoryview(bytearray(PIECE))


OnProgress = Callable[[int, int], object]  # bytes done, bytes in all


@dataclass(frozen=True)
class Hashed:
    """A tensor's SHA-256: of its rows as they are stored, one after the other, without padding."""

    name: str
    dtype: str
    shape: str
    sha256: str


@dataclass(frozen=True)
class ModelDigests:
    """SHA-256 of a model, in hexadecimal.

    weights: of all its weights, whatever their order, alignment and container. metadata: of its keys, None where the
    format has none. findings: what contradicts the digests that the file carries. checked: tensors that do not.
    """

    path: str
    weights: str
    metadata: str | None
    tensors: tuple[Hashed, ...]
    findings: tuple[Finding, ...] = field(default=())
    checked: int = 0


def digests(
    path: str | os.PathLike[str],
    *,
    options: MetaOptions = DEFAULTS,
    threads: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> ModelDigests:
    """The digests of the model at `path`, which is read once, in parallel, a few megabytes at a time.

    options: what to state about a Meta folder. threads: as many as there are processors by default. Raises what `open`
    and reading raise.
    """
    checkpoint = open_checkpoint(path, options)
    with in_file(path):
        common = hub(checkpoint)
        stored = sha256_of(checkpoint.tensors, threads, on_progress)
        weights = _weights(common, stored, threads)
    hashed = tuple(
        Hashed(name, tensor.dtype.name, provenance.spelled(tensor.shape), stored[name])
        for name, tensor in checkpoint.tensors.items()
    )
    found = tuple(_against_recorded(checkpoint, hashed))
    recorded = provenance.recorded_digests(checkpoint.metadata)
    checked = sum(
        tensor.name in recorded and (tensor.dtype, tensor.shape, tensor.sha256) == _facts(recorded[tensor.name])
        for tensor in hashed
    )
    return ModelDigests(str(path), weights, metadata_sha256(checkpoint.metadata), hashed, found, checked)


def sha256_of(
    tensors: Mapping[str, LazyTensor], threads: int | None = None, on_progress: OnProgress = lambda done, total: None
) -> dict[str, str]:
    """The SHA-256 of each tensor's rows, one after the other; tensors in parallel, largest first."""
    total, done, lock, memory = sum(tensor.nbytes for tensor in tensors.values()), 0, Lock(), _Memory()

    def sha256(tensor: LazyTensor) -> str:
        nonlocal done
        digest = hashlib.sha256()
        for data in _stored(tensor, memory):
            digest.update(data)
            with lock:
                done += len(data)
                on_progress(done, total)
        return digest.hexdigest()

    largest_first = sorted(tensors, key=lambda name: -tensors[name].nbytes)
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        found = dict(zip(largest_first, pool.map(sha256, (tensors[name] for name in largest_first)), strict=True))
    return {name: found[name] for name in tensors}


def _stored(tensor: LazyTensor, memory: _Memory) -> Iterator[memoryview]:
    """The bytes of a tensor's rows, a piece at a time, each good until the next is asked for."""
    if not isinstance(tensor, FileTensor) or tensor.strides:
        yield from (tensor.read(*rows).reshape(-1).view(np.uint8).data for rows in row_ranges(tensor))
        return
    for start in range(0, tensor.nbytes, PIECE):
        piece = memory.piece[: tensor.nbytes - start]
        tensor.file.read_into(piece, tensor.offset + start)
        yield piece


def _weights(common: Hub, stored: Mapping[str, str], threads: int | None) -> str:
    """The digest of all weights; a tensor is read again only where its hashed form is not the stored one."""
    forms = {name: _widened(tensor) for name, tensor in common.tensors.items() if name != names.ROPE_FACTORS}
    changed = {name: form for name, form in forms.items() if isinstance(form, (Cast, HeadRows))}
    by_name = {name: stored[common.own[name]] for name in forms} | sha256_of(changed, threads)
    embedding, output = (forms.get(names.MODEL_TENSORS[name]) for name in (names.EMBEDDING, names.OUTPUT))
    left_out = set()
    if embedding is not None and output is not None and embedding.dtype is output.dtype:
        tied = [names.MODEL_TENSORS[name] for name in (names.EMBEDDING, names.OUTPUT)]
        if by_name[tied[0]] == by_name[tied[1]] and embedding.shape == output.shape:
            left_out = {tied[1]}
    lines = sorted(
        f"{name.encode('unicode_escape').decode()} {form.dtype} {provenance.spelled(form.shape)} {by_name[name]}\n"
        for name, form in forms.items()
        if name not in left_out
    )
    return hashlib.sha256("".join(lines).encode("ascii")).hexdigest()


def _widened(tensor: LazyTensor) -> LazyTensor:
    """A tensor of one dimension as F32, as a GGUF has it whatever the source's dtype; others as they are."""
    return Cast(tensor, F32) if len(tensor.shape) == 1 and tensor.dtype in (F16, BF16) else tensor


def metadata_sha256(metadata: Metadata) -> str | None:
    """SHA-256 of the keys that describe the model, sorted, each as GGUF encodes it; None where there are none."""
    keys = sorted(key for key in metadata if not key.startswith(OF_THE_FILE))
    digest = hashlib.sha256()
    for key in keys:
        digest.update(encode_key(key, metadata[key]))
    return digest.hexdigest() if keys else None


def _facts(recorded: provenance.Recorded) -> tuple[str, str, str]:
    return recorded.dtype, recorded.shape, recorded.sha256


def _against_recorded(checkpoint: Checkpoint, hashed: tuple[Hashed, ...]) -> Iterator[Finding]:
    recorded, file = provenance.recorded_digests(checkpoint.metadata), str(checkpoint.path)
    stale = []
    for tensor in hashed:
        record = recorded.get(tensor.name)
        if record is None:
            continue
        if (record.dtype, record.shape) != (tensor.dtype, tensor.shape):
            stale.append(f"'{tensor.name}' was {record.dtype} {record.shape} and is {tensor.dtype} {tensor.shape}")
        elif record.sha256 != tensor.sha256:
            yield Finding(
                "digest",
                f"its bytes have SHA-256 {tensor.sha256}, but {record.sha256} is stored: they changed since",
                file,
                f"tensor {tensor.name!r}",
                remedy="The file is damaged; make or download it again",
            )
    if stale:
        what = f"{len(stale)} of {len(recorded)} stored digests are of another dtype or shape: {printable(stale[0])}"
        yield Finding("digest-stale", what + (", for one" if len(stale) > 1 else ""), file)
    lost = [name for name in recorded if name not in checkpoint.tensors]
    if lost:
        what = f"{len(lost)} of {len(recorded)} stored digests are of tensors that are not here, such as {lost[0]!r}"
        yield Finding("digest-lost", what, file)
