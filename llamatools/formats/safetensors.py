"""Reading safetensors files: u64 length, that many bytes of JSON, then the tensors' data without holes.

The JSON maps each name to {"dtype", "shape", "data_offsets": [begin, end]}, offsets counted from the end of the JSON,
and `__metadata__` to a map of strings.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ..dtypes import BY_NAME, DType
from ..errors import FormatError, UnsupportedError, in_file
from ..layout import File, Layout, PlacedTensor
from ..metadata import Value, string
from ..tensors import FileTensor, SourceFile
from .impostors import refuse_impostor

MAX_HEADER_NBYTES = 100_000_000  # the format's own limit
METADATA = "__metadata__"


def read_safetensors(path: Path) -> Layout:
    """The layout of a safetensors file, tensors in order of their offsets.

    Raises FormatError for a file that is damaged, truncated or hostile, UnsupportedError for a dtype that is unknown.
    """
    with in_file(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        n = int.from_bytes(head, "little")
        if len(head) < 8 or n > min(MAX_HEADER_NBYTES, size - 8):
            refuse_impostor(head + file.read(504), size)
            raise FormatError(
                f"a header of {n} bytes is announced, but {max(size - 8, 0)} follow and {MAX_HEADER_NBYTES} are allowed"
            )
        header = _parse(file.read(n))
        metadata = _metadata(header.pop(METADATA, {}))
        source = SourceFile(path, size)
        tensors = [_tensor(name, facts, source, 8 + n) for name, facts in header.items()]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
        _require_tiling(tensors, 8 + n, size)
    placed = tuple(PlacedTensor(t.name, t.dtype, t.shape, t.offset, t.nbytes, source=t) for t in tensors)
    return Layout("safetensors", (File(path, size),), placed, metadata, data_offset=8 + n)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"no JSON: {error}", where="header") from error
    if not isinstance(header, dict):
        raise FormatError("no JSON object", where="header")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a name occurs twice")
    return unique


def _metadata(stated: Any) -> dict[str, Value]:
    if not isinstance(stated, dict) or not all(isinstance(value, str) for value in stated.values()):
        raise FormatError("it must map names to strings", where=METADATA)
    return {key: string(value) for key, value in stated.items()}


def _tensor(name: str, facts: Any, source: SourceFile, data_offset: int) -> FileTensor:
    where = f"tensor {name!r}"
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("dtype, shape and data_offsets are required, and nothing else", where=where)
    shape, offsets = facts["shape"], facts["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"shape {shape} and data_offsets {offsets} must be counts", where=where)
    dtype = _dtype(facts["dtype"], where)
    nbytes = math.prod(shape) * dtype.block_nbytes
    if nbytes != offsets[1] - offsets[0]:
        raise FormatError(
            f"{dtype} {shape} takes {nbytes} bytes, but its place has {offsets[1] - offsets[0]}", where=where
        )
    return FileTensor(name, dtype, tuple(shape), source, data_offset + offsets[0])


def _dtype(name: Any, where: str) -> DType:
    dtype = BY_NAME.get(name) if isinstance(name, str) else None
    if dtype is None or dtype.block_size != 1:
        raise UnsupportedError(f"dtype {name!r}, which is unknown", where=where)
    return dtype


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _require_tiling(tensors: list[FileTensor], data_offset: int, size: int) -> None:
    end = data_offset
    for tensor in tensors:
        if tensor.offset != end:
            raise FormatError(
                f"its data begins at byte {tensor.offset}, but the data before it ends at {end}",
                where=f"tensor {tensor.name!r}",
            )
        end += tensor.nbytes
    if end != size:
        raise FormatError(
            f"its tensors end at byte {end}, but the file ends at {size}",
            todo="The file is probably truncated" if end > size else "Something else follows them",
        )
