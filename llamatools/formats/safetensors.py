"""Reading safetensors files: their header, and where each tensor lies.

    u64 n (little-endian)  n bytes of JSON, which may end in spaces  the buffer
    {"__metadata__": {text: text}, name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Offsets count from the start of the buffer, which the tensors tile without holes or overlaps. Source of the format:
safetensors/src/tensor.rs of github.com/huggingface/safetensors. This reader is stricter where something could hide:
no key twice, none that is unknown.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from ..dtypes import BY_NAME, DType
from ..errors import FormatError, Report, UnsupportedError, in_file, naming, refuse
from ..layout import File, Layout, PlacedTensor
from ..metadata import Value, string
from ..tensors import FileTensor, SourceFile
from . import strict_json
from .impostors import refuse_impostor

MAX_HEADER_NBYTES = 100_000_000  # the limit of safetensors itself
MAX_NBYTES = (1 << 63) - 1  # of one tensor, were no axis of it 0
METADATA = "__metadata__"
FIELDS = {"dtype", "shape", "data_offsets"}

DTYPES: dict[str, DType] = {
    name: BY_NAME[name]
    for name in (
        "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
        "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
    )
}  # fmt: skip
PACKED = ("F4", "F6_E2M3", "F6_E3M2")  # several weights to a byte


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins so is one, or the beginning of one."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_NBYTES


def read_safetensors(path: Path, *, report: Report = refuse) -> Layout:
    """The layout of a safetensors file, tensors in the order of their bytes.

    report: is told of holes, overlaps and missing data, and if it does not raise, reading goes on.
    Raises FormatError for a file that is damaged, truncated or hostile, UnsupportedError for weights that share bytes.
    """
    with in_file(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, data_offset = _read_header(file.fileno(), size)
        metadata = _metadata(header.pop(METADATA, {}))
        source = SourceFile(path, size)
        tensors = [_tensor(name, entry, source, data_offset) for name, entry in header.items()]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))  # one without weights is before its neighbour
        _require_tiling(tensors, data_offset, size, naming(path, report))
    placed = tuple(PlacedTensor(t.name, t.dtype, t.shape, t.offset, t.nbytes, source=t) for t in tensors)
    return Layout("safetensors", (File(path, size),), placed, metadata, data_offset=data_offset)


def _read_header(fd: int, size: int) -> tuple[dict[str, Any], int]:
    """The header as JSON, and where the buffer begins."""
    head = os.pread(fd, 512, 0)
    if head[8:9] != b"{":
        refuse_impostor(head, size)
        raise FormatError(f"no safetensors file: it begins with {head[:9]!r}")
    nbytes = int.from_bytes(head[:8], "little")
    if nbytes > MAX_HEADER_NBYTES:
        raise FormatError(f"its length is {nbytes} bytes, where {MAX_HEADER_NBYTES} are allowed", where="header")
    data_offset = 8 + nbytes
    if data_offset > size:
        raise FormatError(
            f"it is bytes 8 to {data_offset}, but the file ends at {size}",
            where="header",
            todo="The file is probably truncated",
        )
    text = os.pread(fd, nbytes, 8)
    return strict_json.parse(text, "header"), data_offset


def _metadata(entries: Any) -> dict[str, Value]:
    if not isinstance(entries, dict) or not all(isinstance(text, str) for text in entries.values()):
        raise FormatError("it must map names to texts", where=METADATA)
    for key, text in entries.items():
        _require_characters(key + text, f"{METADATA} key {key!r}")
    return {key: string(text) for key, text in entries.items()}


def _tensor(name: str, entry: Any, source: SourceFile, data_offset: int) -> FileTensor:
    where = f"tensor {name!r}"
    _require_characters(name, where)
    if not isinstance(entry, dict) or entry.keys() != FIELDS:
        raise FormatError("dtype, shape and data_offsets are required, and nothing else", where=where)
    dtype = _dtype(entry["dtype"], where)
    shape = _counts(entry["shape"], "shape", where)
    offsets = _counts(entry["data_offsets"], "data_offsets", where)
    if dtype.block_nbytes * math.prod(axis or 1 for axis in shape) > MAX_NBYTES:
        raise FormatError(f"shape {list(shape)} has more weights than can be counted", where=where)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"its data_offsets are {list(offsets)}, which are no begin and end", where=where)
    tensor = FileTensor(name, dtype, shape, source, data_offset + offsets[0])
    given = offsets[1] - offsets[0]
    if given != tensor.nbytes:
        raise FormatError(f"{dtype} {list(shape)} takes {tensor.nbytes} bytes, but is given {given}", where=where)
    return tensor


def _dtype(name: Any, where: str) -> DType:
    if name in PACKED:
        raise UnsupportedError(f"{name} weights, which share bytes, are not supported", where=where)
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise FormatError(f"unknown dtype {name!r}", where=where)
    return dtype


def _counts(items: Any, what: str, where: str) -> tuple[int, ...]:
    """A list of JSON integers from 0 on; in Python, True would pass for one."""
    if not isinstance(items, list) or not all(type(item) is int and 0 <= item <= MAX_NBYTES for item in items):
        raise FormatError(f"its {what} must be a list of integers from 0 to {MAX_NBYTES}", where=where)
    return tuple(items)


def _require_characters(text: str, where: str) -> None:
    """JSON can escape half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FormatError("half a surrogate pair stands in a text", where=where) from None


def _require_tiling(tensors: list[FileTensor], data_offset: int, size: int, report: Report) -> None:
    end, before = data_offset, "the header ends"
    for tensor in tensors:
        where, start = f"tensor {tensor.name!r}", tensor.offset
        if start != end:
            code, fault = ("hole", "a hole") if start > end else ("overlap", "an overlap")
            what = f"its data begin at byte {start}, but {before} at {end}: {fault}"
            report(FormatError(what, where=where, code=code, span=(min(start, end), max(start, end))))
        end, before = start + tensor.nbytes, f"tensor {tensor.name!r} ends"
    cut = [tensor for tensor in tensors if tensor.offset + tensor.nbytes > size]
    if cut:
        begin, stop = cut[0].offset, cut[0].offset + cut[0].nbytes
        report(
            FormatError(
                f"its data is bytes {begin} to {stop}, but the file ends at {size}",
                where=f"tensor {cut[0].name!r}",
                todo="The file is probably truncated",
                code="truncated",
                span=(size, end),
            )
        )
    elif end < size:
        what = f"{before} at byte {end}, but the file at {size}: bytes that belong to no tensor"
        report(FormatError(what, code="hole", span=(end, size)))
