"""The header of a GGUF v3 file, as bytes.

    "GGUF"  u32 version  u64 tensors  u64 keys
    per key:     string key, u32 kind, value
    per tensor:  string name, u32 axes, u64 length of each axis (fastest first), u32 dtype, u64 offset (from the data)
    padding up to the alignment, then the data: each tensor padded up to the alignment, the last one too

A string is a u64 length and that many bytes; an array a u32 kind, a u64 length and the items. All little-endian.
llama.cpp reads no other offsets than the running sum of the padded sizes, so these follow from the list of tensors.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..dtypes import DType
from ..errors import FormatError, UnsupportedError, UsageError
from ..metadata import Kind, Metadata, Strings, Value, u32

VERSION = 3
DEFAULT_ALIGNMENT = 32  # what a reader assumes where `general.alignment` says nothing
MAX_ALIGNMENT = 2 << 20
MAX_NAME_NBYTES = 63  # llama.cpp keeps names in 64 bytes with a closing zero
MAX_AXES = 4
ALIGNMENT_KEY = "general.alignment"

Entry = tuple[str, DType, tuple[int, ...]]  # name, dtype, shape (outermost axis first)

# numpy's spelling of the kinds that have a fixed size.
NUMBERS = {
    Kind.UINT8: "u1",
    Kind.INT8: "i1",
    Kind.UINT16: "<u2",
    Kind.INT16: "<i2",
    Kind.UINT32: "<u4",
    Kind.INT32: "<i4",
    Kind.FLOAT32: "<f4",
    Kind.BOOL: "?",
    Kind.UINT64: "<u8",
    Kind.INT64: "<i8",
    Kind.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class Header:
    """data: everything before the tensors' data, padding included. offsets: of each tensor, in bytes from the start."""

    data: bytes
    offsets: tuple[int, ...]
    file_size: int

    @property
    def data_offset(self) -> int:
        return len(self.data)


def encode_header(metadata: Metadata, tensors: Sequence[Entry], alignment: int = DEFAULT_ALIGNMENT) -> Header:
    """The header of a file with these keys and tensors, and where the tensors' data belong.

    `general.alignment` is written where it is not the default or `metadata` have it. Raises UsageError for an alignment
    that is no power of two from 32 to 2 MiB, FormatError for names that llama.cpp could not read, UnsupportedError for
    other dtypes.
    """
    if not (DEFAULT_ALIGNMENT <= alignment <= MAX_ALIGNMENT and alignment & (alignment - 1) == 0):
        raise UsageError(f"{alignment} is no power of two from {DEFAULT_ALIGNMENT} to {MAX_ALIGNMENT}", where="--align")
    keys = {key: value for key, value in metadata.items() if key != ALIGNMENT_KEY}
    if alignment != DEFAULT_ALIGNMENT or ALIGNMENT_KEY in metadata:
        keys[ALIGNMENT_KEY] = u32(alignment)
    parts = [struct.pack("<4sIQQ", b"GGUF", VERSION, len(tensors), len(keys))]
    for key, value in keys.items():
        if not key:
            raise FormatError("a key without a name, which GGUF does not allow")
        try:
            parts.append(encode_key(key, value))
        except UnicodeEncodeError:  # JSON can escape it
            raise FormatError("half a surrogate pair, which is no character", where=f"key {key!r}") from None

    offsets = [0]
    for entry in tensors:
        parts.append(_entry(*entry, offsets[-1]))
        _, dtype, shape = entry
        offsets.append(offsets[-1] + padded(dtype.row_nbytes(shape[-1]) * math.prod(shape[:-1]), alignment))
    repeated = Counter(name for name, _, _ in tensors).most_common(1)
    if repeated and repeated[0][1] > 1:
        raise FormatError("two tensors have this name", where=f"tensor {repeated[0][0]!r}")
    header = b"".join(parts)
    header += bytes(padded(len(header), alignment) - len(header))
    *starts, end = (len(header) + offset for offset in offsets)
    return Header(header, tuple(starts), end)


def encode_key(key: str, value: Value) -> bytes:
    """A metadata key with its value, as a GGUF file holds them."""
    return _strings([key]) + struct.pack("<I", value.kind) + _value(value)


def entry_nbytes(name: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes in the header."""
    return len(_strings([name])) + struct.calcsize(f"<I{len(shape)}QIQ")


def padded(nbytes: int, alignment: int) -> int:
    """`nbytes` rounded up to the alignment."""
    return -(-nbytes // alignment) * alignment


def check_rows(dtype: DType, shape: tuple[int, ...], where: str, todo: str | None = None) -> None:
    """Raises FormatError where the rows of this shape are no whole number of blocks."""
    row = shape[-1] if shape else 1
    if row % dtype.block_size:
        what = f"rows of {row} weights do not divide into {dtype} blocks of {dtype.block_size}"
        raise FormatError(what, where=where, todo=todo, code="shape")


def _entry(name: str, dtype: DType, shape: tuple[int, ...], offset: int) -> bytes:
    where = f"tensor {name!r}"
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > MAX_NAME_NBYTES:
        raise FormatError(f"a name of {len(encoded)} bytes, where GGUF allows {MAX_NAME_NBYTES}", where=where)
    if not 1 <= len(shape) <= MAX_AXES:
        raise FormatError(f"{len(shape)} axes, where GGUF allows 1 to {MAX_AXES}", where=where)
    if dtype.id is None:
        raise UnsupportedError(f"GGUF has no type for {dtype} weights", where=where)
    check_rows(dtype, shape, where, todo="Add a rule giving it F16")
    fields = struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), dtype.id, offset)
    return _strings([name]) + fields


def _value(value: Value) -> bytes:
    if value.kind is Kind.STRING:
        return _strings([value.data])
    if value.kind is not Kind.ARRAY:
        return np.array(value.data, NUMBERS[value.kind]).tobytes()
    assert value.item is not None, "an array has a kind of items"
    numbers = value.item is not Kind.STRING
    items = np.asarray(value.data, NUMBERS[value.item]).tobytes() if numbers else _strings(value.data)
    return struct.pack("<IQ", value.item, len(value.data)) + items


def _strings(texts: Iterable[str]) -> bytes:
    if isinstance(texts, Strings) and texts.as_in_gguf:
        return bytes(texts.buffer)
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    lengths = list(map(len, encoded))
    packed = {length: struct.pack("<Q", length) for length in set(lengths)}  # few, where strings are 100,000
    parts = [b""] * (2 * len(encoded))
    parts[::2] = map(packed.__getitem__, lengths)
    parts[1::2] = encoded
    return b"".join(parts)
