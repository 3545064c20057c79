"""Importance matrices: how much each column of a tensor matters, as llama.cpp's llama-imatrix measured it.

For a matrix (rows, columns) the importance of a column is the mean square of the activations that it was multiplied by
over some text. llama.cpp has stored it in two forms, and both are read:

GGUF: for each tensor NAME an F32 tensor `NAME.in_sum2` (experts, columns), sums of squares, and one `NAME.counts`
(experts, 1), how many vectors were summed; keys `imatrix.datasets`, `imatrix.chunk_count`, `imatrix.chunk_size`.

.dat, little-endian:
    i32 entries
    per entry:  i32 length and the name, i32 calls, i32 values, float32 means times calls
    perhaps     i32 chunks, then perhaps i32 length and the dataset's name
Several experts are one entry, one after the other.

Normalised as llama.cpp does (tools/quantize/quantize.cpp, load_imatrix).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..dtypes import F32, Floats
from ..errors import FormatError, in_file
from ..layout import Layout, PlacedTensor
from ..metadata import Kind
from ..tensors import read_floats
from .gguf import read_gguf
from .gguf_write import MAX_NAME_NBYTES
from .window import Window

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, N_CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
REMEDY = "llama-imatrix of llama.cpp writes such files"


@dataclass(frozen=True)
class Imatrix:
    """What an importance matrix's file holds.

    importance: by tensor, (experts * columns,) float32, finite and not negative.
    datasets: the texts that it was measured on. n_chunks: how many pieces of them; None where the file does not say.
    """

    path: Path
    importance: Mapping[str, Floats]
    datasets: tuple[str, ...] = field(default=())
    n_chunks: int | None = None


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """The importance matrix in a file of either form, told apart by content.

    Raises FormatError for a file that is damaged, or no importance matrix.
    """
    path = Path(path)
    with in_file(path):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) != b"GGUF":
                return _read_dat(path, Window(file.fileno(), size))
        return _from_gguf(path, read_gguf(path))


def _from_gguf(path: Path, layout: Layout) -> Imatrix:
    for key in (DATASETS, N_CHUNKS, CHUNK_SIZE):
        if key not in layout.metadata:
            raise FormatError(f"no importance matrix: there is no key {key!r}", todo=REMEDY)
    datasets, n_chunks = layout.metadata[DATASETS], layout.metadata[N_CHUNKS]
    if datasets.item is not Kind.STRING or n_chunks.kind is not Kind.UINT32:
        raise FormatError(f"{DATASETS} must be strings and {N_CHUNKS} a uint32", where="imatrix keys")
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    names = dict.fromkeys(name.removesuffix(end) for name in tensors for end in (SUMS, COUNTS) if name.endswith(end))
    if not names:
        raise FormatError(f"no importance matrix: no tensor's name ends in {SUMS!r}", todo=REMEDY)
    importance = {name: _checked(name, _normalised(name, tensors)) for name in names}
    return Imatrix(path, importance, tuple(datasets.data), int(n_chunks.data))


def _normalised(name: str, tensors: Mapping[str, PlacedTensor]) -> Floats:
    """The mean square of each column, (experts * columns,); 1 for an expert that was never asked."""
    for part in (SUMS, COUNTS):
        if name + part not in tensors:
            raise FormatError(f"there is no {name + part!r} beside its counterpart", where=f"tensor {name!r}")
        if tensors[name + part].dtype is not F32:
            raise FormatError(f"{tensors[name + part].dtype} where F32 is required", where=f"tensor {name + part!r}")
    sums, counts = (_flat(tensors[name + part]) for part in (SUMS, COUNTS))
    if not len(counts) or len(sums) % len(counts):
        raise FormatError(f"{len(sums)} sums do not divide into {len(counts)} counts", where=f"tensor {name!r}")
    if not np.isfinite(counts).all():
        raise FormatError("a count that is no number", where=f"tensor {name + COUNTS!r}")
    counts = np.floor(counts + np.float32(0.5))
    means = np.ones((len(counts), len(sums) // len(counts)), np.float32)
    with np.errstate(over="ignore"):
        np.divide(sums.reshape(means.shape), counts[:, None], out=means, where=counts[:, None] > 0)
    return means.ravel()


def _flat(tensor: PlacedTensor) -> Floats:
    assert tensor.source is not None, "a tensor that was read has a source"
    return read_floats(tensor.source).ravel()


def _read_dat(path: Path, window: Window) -> Imatrix:
    (n_entries,) = window.unpack("<i", "header")
    if n_entries < 1:
        raise FormatError(f"no importance matrix: it would have {n_entries} entries", todo=REMEDY)
    window.announce(n_entries, 4 + 1 + 4 + 4 + 4, "entries", "header")
    importance: dict[str, Floats] = {}
    for n in range(n_entries):
        name = _read_name(window, f"entry {n}", MAX_NAME_NBYTES)
        where = f"entry {name!r}"
        if name in importance:
            raise FormatError("it stands twice in the file", where=where)
        n_calls, n_values = window.unpack("<ii", where)
        if n_values < 1:
            raise FormatError(f"it would have {n_values} values", where=where)
        sums: Floats = window.numbers("<f4", n_values, where)
        importance[name] = _checked(name, sums / np.float32(max(n_calls, 1)))
    if window.at_end():
        return Imatrix(path, importance)
    (n_chunks,) = window.unpack("<i", "number of chunks")
    if window.at_end():
        return Imatrix(path, importance, (), n_chunks)
    dataset = _read_name(window, "dataset", 1 << 16)
    if not window.at_end():
        raise FormatError("more bytes follow where it should end", where=f"byte {window.at}")
    return Imatrix(path, importance, (dataset,) if dataset else (), n_chunks)


def _read_name(window: Window, where: str, most: int) -> str:
    (nbytes,) = window.unpack("<i", where)
    if not 0 <= nbytes <= most:
        raise FormatError(f"a name of {nbytes} bytes, where 0 to {most} are allowed", where=where)
    return window.take(nbytes, where).decode("utf-8", "surrogateescape")


def _checked(name: str, importance: Floats) -> Floats:
    bad = np.flatnonzero(~(np.isfinite(importance) & (importance >= 0)))
    if len(bad):
        raise FormatError(
            f"column {bad[0]} has importance {importance[bad[0]]}, which no mean of squares is",
            where=f"tensor {name!r}",
        )
    return importance
