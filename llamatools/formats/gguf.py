"""Reading GGUF files: their header, and where each tensor lies. The byte layout stands in gguf_write.py.

Version 2 reads as version 3 does. Counts and lengths are believed only as far as bytes are left, offsets only as far as
gguf_placement.py finds them right. Whatever is accepted here, llama.cpp's gguf_init_from_file accepts
(ggml/src/gguf.cpp). What is not accepted is told to a report: `refuse` raises it, a list's append collects it.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import BY_ID, DType
from ..errors import FormatError, Report, UnsupportedError, in_file, naming, refuse
from ..layout import File, Layout, PlacedTensor
from ..metadata import Kind, Metadata, Value
from ..tensors import SourceFile
from .gguf_placement import Entry, place, require_data
from .gguf_strings import read_strings
from .gguf_write import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAX_AXES, MAX_NAME_NBYTES, NUMBERS, check_rows
from .impostors import refuse_impostor
from .window import Window

VERSIONS = (2, 3)
MAX_COUNT = 1 << 17  # of keys and of tensors: each takes about a kilobyte of memory here, and 30 bytes in the file
MIN_KEY_NBYTES = 8 + 1 + 4 + 1
MIN_TENSOR_NBYTES = 8 + 4 + 4 + 8
MAX_NBYTES = (1 << 63) - 1  # of a tensor, were no axis of it 0
REMOVED = {4, 5, 31, 32, 33, 36, 37, 38}  # ggml's numbers of types that it once had (ggml/include/ggml.h)


def read_gguf(path: Path, *, header_only: bool = False, report: Report = refuse) -> Layout:
    """The layout of a GGUF file, version 2 or 3, little-endian.

    header_only: accept a file that ends after its header. report: is told what is wrong with the file; unless it
    raises, reading goes on, and where it cannot, the layout has what was read so far.
    Raises FormatError for a file that is damaged, truncated or hostile, UnsupportedError for other versions, the other
    byte order and types of weights that are unknown.
    """
    report = naming(path, report)
    with in_file(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        window = Window(file.fileno(), size)
        version = _read_version(window, size)
        layout = Layout(f"GGUF v{version}", (File(path, size),), ())
        metadata: dict[str, Value] = {}
        entries: list[Entry] = []
        try:
            n_tensors, n_keys = window.unpack("<QQ", "header")
            _believe(n_tensors, "tensors", MIN_TENSOR_NBYTES, window)
            _believe(n_keys, "keys", MIN_KEY_NBYTES, window)
            _read_metadata(window, n_keys, metadata, report)
            stated = _alignment(metadata, report)
            _read_entries(window, n_tensors, entries, report)
        except FormatError as error:
            report(error)
            listed = tuple(PlacedTensor(e.name, e.dtype, e.shape, e.offset, e.nbytes or 0) for e in entries)
            return replace(layout, tensors=listed, metadata=metadata, stopped_at=window.at)
        source = SourceFile(path, size)
        is_in_doubt = stated is None and ALIGNMENT_KEY in metadata
        data_offset, tensors = place(entries, source, window.at, stated, window.peek, report, is_in_doubt=is_in_doubt)
    if not header_only:
        require_data(tensors, size, report)
    return replace(
        layout,
        tensors=tensors,
        metadata=metadata,
        alignment=stated or DEFAULT_ALIGNMENT,
        header_end=window.at,
        data_offset=data_offset,
    )


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


def _read_metadata(window: Window, n_keys: int, metadata: dict[str, Value], report: Report) -> None:
    for n in range(n_keys):
        start = window.at
        key = _read_text(window, f"key {n}")
        where = f"key {key!r}"
        if not key:
            report(FormatError("it has no name", where=f"key {n}", code="key-name", span=(start, window.at)))
        value = _read_value(window, where)
        if key in metadata:
            report(FormatError("it stands twice in the file", where=where, code="key-twice", span=(start, window.at)))
        else:
            metadata[key] = value


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


def _alignment(metadata: Metadata, report: Report) -> int | None:
    """What the file states, None where that is nothing or no alignment."""
    value = metadata.get(ALIGNMENT_KEY)
    if value is None:
        return None
    where = f"key {ALIGNMENT_KEY!r}"
    if value.kind is not Kind.UINT32:
        report(FormatError(f"{value.kind} where uint32 is required", where=where, code="key-type"))
        return None
    alignment = int(value.data)
    if alignment == 0 or alignment & (alignment - 1):
        report(FormatError(f"{alignment} is no power of two", where=where, code="alignment-value"))
        return None
    return alignment


def _read_entries(window: Window, n_tensors: int, entries: list[Entry], report: Report) -> None:
    seen: set[str] = set()
    for n in range(n_tensors):
        entry = _read_entry(window, n, report)
        entries.append(entry)
        if entry.name in seen:
            where = f"tensor {entry.name!r}"
            report(FormatError("two tensors have this name", where=where, code="tensor-twice"))
        seen.add(entry.name)


def _read_entry(window: Window, n: int, report: Report) -> Entry:
    start = window.at
    (name_nbytes,) = window.unpack("<Q", f"tensor {n}")
    if name_nbytes > MAX_NAME_NBYTES:
        what = f"a name of {name_nbytes} bytes, where {MAX_NAME_NBYTES} are allowed"
        report(FormatError(what, where=f"tensor {n}", code="tensor-name", span=(start, start + 8)))
    name = window.take(name_nbytes, f"tensor {n}").decode("utf-8", "surrogateescape")
    where = f"tensor {name!r}"
    (n_axes,) = window.unpack("<I", where)
    if n_axes > MAX_AXES:
        raise FormatError(f"{n_axes} axes, where {MAX_AXES} are allowed", where=where)
    *lengths, id_, offset = window.unpack(f"<{n_axes}QIQ", where)  # fastest axis first
    shape = tuple(reversed(lengths))
    dtype = BY_ID.get(id_)
    if dtype is None:
        has = "ggml has given up" if id_ in REMOVED else "is unknown"
        what = f"weights of ggml's type {id_}, which {has}"
        report(UnsupportedError(what, where=where, code="dtype", span=(window.at - 12, window.at - 8)))
        return Entry(name, DType(f"type {id_}", id_, np.dtype((np.void, 0))), shape, offset, None)
    try:
        check_rows(dtype, shape, where)
        nbytes = math.prod(axis or 1 for axis in shape) // dtype.block_size * dtype.block_nbytes
        if max(nbytes, *shape, 0) > MAX_NBYTES:
            what = f"{dtype} {list(shape)} takes {nbytes} bytes, where {MAX_NBYTES} can be counted"
            raise FormatError(what, where=where, code="shape")
    except FormatError as error:
        report(error)
        return Entry(name, dtype, shape, offset, None)
    return Entry(name, dtype, shape, offset, nbytes if all(shape) else 0)
