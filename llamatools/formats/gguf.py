"""Reading GGUF files: their header, and where each tensor lies. The byte layout stands in gguf_write.py.

Version 2 reads as version 3 does. Before anything is believed, one equation is held against the file: every tensor
begins at the running sum of the padded sizes before it, and ends inside the file. Sums are Python integers, which do
not overflow; counts and lengths are believed only as far as bytes are left.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..dtypes import BY_ID, DType
from ..errors import FormatError, UnsupportedError, in_file
from ..layout import File, Layout, PlacedTensor
from ..metadata import Kind, Strings, Value
from ..tensors import FileTensor, SourceFile
from .gguf_strings import chain_of_strings
from .gguf_write import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAX_AXES, MAX_NAME_NBYTES, NUMBERS, padded
from .impostors import refuse_impostor

FIRST_WINDOW = 1 << 20  # bytes read at first; a header with a large vocabulary needs a few doublings
MIN_KEY_NBYTES = 8 + 1 + 4 + 1
MIN_TENSOR_NBYTES = 8 + 4 + 4 + 8
MAX_STRING_NBYTES = 1 << 30  # llama.cpp's limit


def read_gguf(path: Path, *, header_only: bool = False) -> Layout:
    """The layout of a GGUF file, version 2 or 3, little-endian.

    header_only: accept a file that ends after its header. Raises FormatError for a file that is damaged, truncated or
    hostile, UnsupportedError for other versions, the other byte order and tensors of unknown type.
    """
    with in_file(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        reader = _Reader(file.fileno(), size)
        version = _check_start(reader, size)
        n_tensors, n_keys = reader.integers("<QQ", "the counts")
        for n, at_least, what in ((n_keys, MIN_KEY_NBYTES, "keys"), (n_tensors, MIN_TENSOR_NBYTES, "tensors")):
            if n * at_least > size - reader.at:
                raise FormatError(f"{n} {what} are announced, but only {size - reader.at} bytes follow", where="header")
        metadata = _read_metadata(reader, n_keys)
        alignment = _alignment(metadata)
        entries = [_read_entry(reader) for _ in range(n_tensors)]
        data_offset = padded(reader.at, alignment)
        source = SourceFile(path, size)
        tensors = _place(entries, source, data_offset, alignment, header_only)
    return Layout(f"GGUF v{version}", (File(path, size),), tensors, metadata, alignment, data_offset)


def _check_start(reader: _Reader, size: int) -> int:
    head = reader.peek(512)
    if head[:4] == b"FUGG":
        raise UnsupportedError("a GGUF file whose magic is of the other byte order")
    if head[:4] != b"GGUF":
        refuse_impostor(head, size)
        raise FormatError(f"no GGUF file: it begins with {head[:4]!r}")
    reader.at = 4
    (version,) = reader.integers("<I", "the version")
    if version not in (2, 3):
        if version and version & 0xFFFF == 0:
            raise UnsupportedError("a big-endian GGUF file", todo="Only little-endian ones are read")
        if version == 1:
            raise UnsupportedError("GGUF version 1, which no current tool writes", todo="Versions 2 and 3 are read")
        raise FormatError(f"GGUF version {version}, where 2 and 3 are known")
    return int(version)


class _Reader:
    """Reads the header in order, in windows that grow as it turns out longer."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self.size, self.at = fd, size, 0
        self._window = b""

    def peek(self, n: int) -> bytes:
        """Up to `n` bytes from where the reader is; fewer at the end of the file."""
        self._reach(min(self.at + n, self.size))
        return self._window[self.at : self.at + n]

    def integers(self, fields: str, what: str) -> tuple[Any, ...]:
        n = struct.calcsize(fields)
        self.need(n, what)
        values = struct.unpack_from(fields, self._window, self.at)
        self.at += n
        return values

    def string(self, what: str, limit: int = MAX_STRING_NBYTES) -> str:
        (n,) = self.integers("<Q", what)
        if n > limit:
            raise FormatError(f"a string of {n} bytes, where {limit} are allowed", where=what)
        self.need(n, what)
        text = self._window[self.at : self.at + n].decode("utf-8", "surrogateescape")
        self.at += n
        return text

    def array(self, dtype: str, n: int, what: str) -> np.ndarray[Any, Any]:
        nbytes = n * np.dtype(dtype).itemsize
        self.need(nbytes, what)
        values = np.frombuffer(self._window, dtype, n, self.at)
        self.at += nbytes
        return values

    def strings(self, n: int, what: str) -> Strings:
        """An array of n strings. The window grows until the chain of their lengths ends inside it."""
        if n * 8 > self.size - self.at:
            raise FormatError(f"{n} strings are announced, but only {self.size - self.at} bytes follow", where=what)
        wanted = self.at + n * 16
        while True:
            self._reach(min(wanted, self.size))
            chain = chain_of_strings(self._window, self.at, n)
            if chain is not None:
                break
            if len(self._window) >= self.size:
                raise FormatError(f"its strings run past the end of the file at {self.size}", where=what)
            wanted = 2 * len(self._window)
        starts, ends = chain
        self.at = int(ends[-1]) if n else self.at
        return Strings(self._window, starts, ends)

    def need(self, n: int, what: str) -> None:
        end = self.at + n
        if end > self.size:
            raise FormatError(
                f"bytes {self.at} to {end} are needed, but the file ends at {self.size}",
                where=what,
                todo="The file is probably truncated",
            )
        self._reach(end)

    def _reach(self, end: int) -> None:
        """Makes the window hold everything up to `end`, which is at most the file's size."""
        if end > len(self._window):
            wanted = min(max(end, 2 * len(self._window), FIRST_WINDOW), self.size)
            grown = bytearray(self._window)
            while len(grown) < wanted:
                more = os.pread(self._fd, wanted - len(grown), len(grown))
                if not more:
                    raise FormatError(f"it had {self.size} bytes and ends at {len(grown)} now")
                grown += more
            self._window = bytes(grown)


def _read_metadata(reader: _Reader, n_keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for n in range(n_keys):
        key = reader.string(f"key {n}")
        where = f"key {key!r}"
        if not key:
            raise FormatError("an empty name", where=f"key {n}")
        if key in metadata:
            raise FormatError("it occurs twice", where=where)
        metadata[key] = _read_value(reader, where)
    return metadata


def _read_value(reader: _Reader, where: str) -> Value:
    kind = _kind(reader, where)
    if kind is Kind.STRING:
        return Value(kind, reader.string(where))
    if kind is not Kind.ARRAY:
        return Value(kind, reader.array(NUMBERS[kind], 1, where)[0].item())
    item = _kind(reader, where)
    (n,) = reader.integers("<Q", where)
    if item is Kind.ARRAY:
        raise FormatError("an array of arrays, which no GGUF reader takes", where=where)
    return Value(kind, reader.strings(n, where) if item is Kind.STRING else reader.array(NUMBERS[item], n, where), item)


def _kind(reader: _Reader, where: str) -> Kind:
    (number,) = reader.integers("<I", where)
    if number >= len(Kind):
        raise FormatError(f"value type {number}, where 0 to {len(Kind) - 1} are known", where=where)
    return Kind(number)


def _alignment(metadata: dict[str, Value]) -> int:
    value = metadata.get(ALIGNMENT_KEY)
    if value is None:
        return DEFAULT_ALIGNMENT
    where = f"key '{ALIGNMENT_KEY}'"
    if value.kind is not Kind.UINT32:
        raise FormatError(f"{value.kind} where uint32 is required", where=where)
    alignment = int(value.data)
    if alignment == 0 or alignment & (alignment - 1):
        raise FormatError(f"{alignment} is no power of two", where=where)
    return alignment


@dataclass(frozen=True)
class _Entry:
    """A tensor as the file states it; its offset is relative to the data."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int


def _read_entry(reader: _Reader) -> _Entry:
    at = reader.at
    name = reader.string(f"the tensor at byte {at}", limit=MAX_NAME_NBYTES)
    where = f"tensor {name!r}"
    (n_axes,) = reader.integers("<I", where)
    if n_axes > MAX_AXES:
        raise FormatError(f"{n_axes} axes, where GGUF allows {MAX_AXES}", where=where)
    *shape, id_, offset = reader.integers(f"<{n_axes}QIQ", where)
    if any(axis >= 1 << 63 for axis in shape) or math.prod(shape) >= 1 << 63:
        raise FormatError(f"shape {shape[::-1]} has more weights than can be counted", where=where)
    dtype = BY_ID.get(id_)
    if dtype is None:
        raise UnsupportedError(f"type {id_}, which is unknown", where=where)
    row = shape[0] if shape else 1
    if row % dtype.block_size:
        raise FormatError(f"rows of {row} weights do not divide into {dtype} blocks of {dtype.block_size}", where=where)
    return _Entry(name, dtype, tuple(reversed(shape)), offset)


def _place(
    entries: list[_Entry], source: SourceFile, data_offset: int, alignment: int, header_only: bool
) -> tuple[PlacedTensor, ...]:
    """The tensors with their sources. Each must begin at the running sum of padded sizes and end inside the file."""
    tensors: dict[str, PlacedTensor] = {}
    expected = 0
    for entry in entries:
        where = f"tensor {entry.name!r}"
        if entry.name in tensors:
            raise FormatError("two tensors have this name", where=where)
        if entry.offset != expected:
            raise FormatError(
                f"its offset is {entry.offset}, but the tensors before it end at {expected} with padding to {alignment}",
                where=where,
                todo="The file was written wrongly or is damaged",
            )
        tensor = FileTensor(entry.name, entry.dtype, entry.shape, source, data_offset + entry.offset)
        end = tensor.offset + tensor.nbytes
        if end > source.size and not header_only:
            raise FormatError(
                f"its data is bytes {tensor.offset} to {end}, but the file ends at {source.size}",
                where=where,
                todo="The file is probably truncated",
            )
        tensors[entry.name] = PlacedTensor(
            entry.name, entry.dtype, entry.shape, tensor.offset, tensor.nbytes, source=tensor
        )
        expected += padded(tensor.nbytes, alignment)
    return tuple(tensors.values())
