"""Reading GGUF files: their header, and where each tensor lies. The byte layout stands in gguf_write.py.

Version 2 reads as version 3 does. Before anything is believed, one equation is held against the file: every tensor
begins at the running sum of the padded sizes before it, and ends inside the file. Sums are Python integers, which do
not overflow; counts and lengths are believed only as far as bytes are left. Whatever is accepted here, llama.cpp's
gguf_init_from_file accepts (ggml/src/gguf.cpp).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..dtypes import BY_ID, DType
from ..errors import FormatError, UnsupportedError, in_file
from ..layout import File, Layout, PlacedTensor
from ..metadata import Kind, Metadata, Value
from ..tensors import FileTensor, SourceFile
from .gguf_strings import read_strings
from .gguf_write import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAX_AXES, MAX_NAME_NBYTES, NUMBERS, check_rows, padded
from .impostors import refuse_impostor
from .window import Window

VERSIONS = (2, 3)
MAX_COUNT = 1 << 17  # of keys and of tensors: each takes about a kilobyte of memory here, and 30 bytes in the file
MIN_KEY_NBYTES = 8 + 1 + 4 + 1
MIN_TENSOR_NBYTES = 8 + 4 + 4 + 8
MAX_NBYTES = (1 << 63) - 1  # of a tensor, were no axis of it 0
REMOVED = {4, 5, 31, 32, 33, 36, 37, 38}  # ggml's numbers of types that it once had (ggml/include/ggml.h)


def read_gguf(path: Path, *, header_only: bool = False) -> Layout:
    """The layout of a GGUF file, version 2 or 3, little-endian.

    header_only: accept a file that ends after its header.
    Raises FormatError for a file that is damaged, truncated or hostile, UnsupportedError for other versions, the other
    byte order and types of weights that are unknown.
    """
    with in_file(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        window = Window(file.fileno(), size)
        version = _read_version(window, size)
        n_tensors, n_keys = window.unpack("<QQ", "header")
        _believe(n_tensors, "tensors", MIN_TENSOR_NBYTES, window)
        _believe(n_keys, "keys", MIN_KEY_NBYTES, window)
        metadata = _read_metadata(window, n_keys)
        alignment = _alignment(metadata)
        entries = [_read_entry(window, n) for n in range(n_tensors)]
        data_offset = padded(window.at, alignment)
        tensors = _place(entries, SourceFile(path, size), data_offset, alignment)
        if not header_only:
            _require_data(tensors, size)
    return Layout(f"GGUF v{version}", (File(path, size),), tensors, metadata, alignment, data_offset)


def _read_version(window: Window, size: int) -> int:
    head = window.peek(512).tobytes()
    if head[:4] != b"GGUF":
        refuse_impostor(head, size)
        raise FormatError(f"no GGUF file: it begins with {head[:4]!r}")
    _, version = window.unpack("<4sI", "header")
    todo = "Versions 2 and 3 are read, little-endian"
    if version == 0:
        raise FormatError("GGUF version 0, which never was", todo=todo)
    if version & 0xFFFF == 0:
        raise UnsupportedError(
            f"a big-endian GGUF file of version {int.from_bytes(version.to_bytes(4, 'little'), 'big')}", todo=todo
        )
    if version not in VERSIONS:
        raise UnsupportedError(f"GGUF version {version}", todo=todo)
    return int(version)


def _believe(n: int, what: str, nbytes_each: int, window: Window) -> None:
    window.announce(n, nbytes_each, what, "header")
    if n > MAX_COUNT:
        raise FormatError(f"{n} {what} are announced, where {MAX_COUNT} are allowed", where="header")


def _read_metadata(window: Window, n_keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for n in range(n_keys):
        key = _read_text(window, f"key {n}")
        where = f"key {key!r}"
        if not key:
            raise FormatError("it has no name", where=f"key {n}")
        if key in metadata:
            raise FormatError("it stands twice in the file", where=where)
        metadata[key] = _read_value(window, where)
    return metadata


def _read_text(window: Window, where: str) -> str:
    """A string. Bytes that are not UTF-8 become surrogates, as in `metadata.Strings`."""
    (nbytes,) = window.unpack("<Q", where)
    return window.take(nbytes, where).decode("utf-8", "surrogateescape")


def _read_value(window: Window, where: str) -> Value:
    kind = _read_kind(window, where)
    if kind is Kind.STRING:
        return Value(kind, _read_text(window, where))
    if kind is not Kind.ARRAY:
        return Value(kind, _read_numbers(window, kind, 1, where)[0].item())
    item = _read_kind(window, where)
    (n,) = window.unpack("<Q", where)
    if item is Kind.ARRAY:
        raise FormatError("an array of arrays, which llama.cpp does not read either", where=where)
    if item is Kind.STRING:
        return Value(kind, read_strings(window, n, where), item)
    return Value(kind, _read_numbers(window, item, n, where), item)


def _read_kind(window: Window, where: str) -> Kind:
    (number,) = window.unpack("<I", where)
    if number >= len(Kind):
        raise FormatError(f"value type {number}, where 0 to {len(Kind) - 1} are known", where=where)
    return Kind(number)


def _read_numbers(window: Window, kind: Kind, n: int, where: str) -> NDArray[Any]:
    """(n,) numbers of a kind. Any byte but 0 is true, as in llama.cpp."""
    if kind is Kind.BOOL:
        return window.numbers("u1", n, where).astype(bool)
    return window.numbers(NUMBERS[kind], n, where)


def _alignment(metadata: Metadata) -> int:
    value = metadata.get(ALIGNMENT_KEY)
    if value is None:
        return DEFAULT_ALIGNMENT
    where = f"key {ALIGNMENT_KEY!r}"
    if value.kind is not Kind.UINT32:
        raise FormatError(f"{value.kind} where uint32 is required", where=where)
    alignment = int(value.data)
    if alignment == 0 or alignment & (alignment - 1):
        raise FormatError(f"{alignment} is no power of two", where=where)
    return alignment


@dataclass(frozen=True)
class _Entry:
    """A tensor as the file states it; its offset counts from where the data begin."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int


def _read_entry(window: Window, n: int) -> _Entry:
    (nbytes,) = window.unpack("<Q", f"tensor {n}")
    if nbytes > MAX_NAME_NBYTES:
        raise FormatError(f"a name of {nbytes} bytes, where {MAX_NAME_NBYTES} are allowed", where=f"tensor {n}")
    name = window.take(nbytes, f"tensor {n}").decode("utf-8", "surrogateescape")
    where = f"tensor {name!r}"
    (n_axes,) = window.unpack("<I", where)
    if n_axes > MAX_AXES:
        raise FormatError(f"{n_axes} axes, where {MAX_AXES} are allowed", where=where)
    *lengths, id_, offset = window.unpack(f"<{n_axes}QIQ", where)  # fastest axis first
    shape = tuple(reversed(lengths))
    dtype = BY_ID.get(id_)
    if dtype is None:
        raise UnsupportedError(
            f"weights of ggml's type {id_}, which {'ggml has given up' if id_ in REMOVED else 'is unknown'}",
            where=where,
        )
    check_rows(dtype, shape, where)
    nbytes = math.prod(axis or 1 for axis in shape) // dtype.block_size * dtype.block_nbytes
    if max(nbytes, *shape, 0) > MAX_NBYTES:
        raise FormatError(f"{dtype} {list(shape)} takes {nbytes} bytes, where {MAX_NBYTES} can be counted", where=where)
    return _Entry(name, dtype, shape, offset)


def _place(entries: list[_Entry], source: SourceFile, data_offset: int, alignment: int) -> tuple[PlacedTensor, ...]:
    """The tensors where they must be: each begins at the running sum of the padded sizes before it."""
    tensors: dict[str, PlacedTensor] = {}
    expected = 0
    for entry in entries:
        where = f"tensor {entry.name!r}"
        if entry.name in tensors:
            raise FormatError("two tensors have this name", where=where)
        if entry.offset != expected:
            raise FormatError(
                f"its offset is {entry.offset}, but padded to {alignment} the tensors before it end at {expected}",
                where=where,
                todo="The file is damaged or was written wrongly",
            )
        tensor = FileTensor(entry.name, entry.dtype, entry.shape, source, data_offset + entry.offset)
        tensors[tensor.name] = PlacedTensor(
            tensor.name, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes, source=tensor
        )
        expected += padded(tensor.nbytes, alignment)
    return tuple(tensors.values())


def _require_data(tensors: Iterable[PlacedTensor], size: int) -> None:
    """Every tensor must end inside the file; the padding behind the last one may be missing, as in llama.cpp."""
    for tensor in tensors:
        if tensor.end > size:
            raise FormatError(
                f"its data is bytes {tensor.offset} to {tensor.end}, but the file ends at {size}",
                where=f"tensor {tensor.name!r}",
                todo="The file is probably truncated",
            )
