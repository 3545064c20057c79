"""torch.save's zip files (.pth, .pt, .ckpt): tensors by name, each checked against the file, none of them read.

    X/data.pkl      a pickle: dicts of texts, numbers and tensors, which are views of storages
    X/data/KEY      a storage's weights, little-endian, one after the other
    X/version       "3"; X/byteorder "little" or, from a few machines, "big"; records that readers need not know

X is the top folder, whatever its name. Tensors inside of dicts and lists are named by their path: "model.norm.weight".
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import FormatError, LlamatoolsError, UnsupportedError, in_file
from ..tensors import FileTensor, SourceFile
from . import torch_zip
from .impostors import refuse_impostor
from .torch_pickle import kind_of, read_pickle
from .torch_symbols import Storage, StoredTensor, Symbol
from .torch_zip import Record

PICKLE = "data.pkl"
RECORDS = re.compile(
    r"data\.pkl|data/[0-9]{1,19}|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)
VERSIONS = range(1, 11)  # what torch 2.13 reads: inline_container.h and caffe2/serialize/versions.h

MAX_PICKLE = 64 << 20  # bytes; a model of 100,000 tensors needs 20 MB
MAX_DEPTH = 32  # of dicts and lists in each other
MAX_NAMES = 16 << 20  # characters of all values' names
MAX_REPEATED = 1 << 30  # bytes of a tensor that is larger than its storage because an axis has stride 0

ZIP, TAR = b"PK\x03\x04", b"ustar"  # at byte 0, and at byte 257
# The magic number 0x1950A86A20F9469CFC6C as a pickled integer, after the protocol: torch before 1.6.
LEGACY = re.compile(rb"\x80.(?:\x95.{8})?\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", re.DOTALL)
RESAVE = "Save it again with torch 1.6 or later: torch.save(torch.load(f, weights_only=True), g)"


@dataclass(frozen=True)
class PthFile:
    """tensors: in the order of the file. others: numbers, texts, None and the like, named in the same way."""

    file: SourceFile
    tensors: dict[str, FileTensor]
    others: dict[str, object]


def is_pth(head: bytes) -> bool:
    """Whether a file that begins so (512 bytes) is torch's, in this format or one that is refused by name."""
    return head[:4] == ZIP or head[:1] == b"\x80" or head[257:262] == TAR


def read_pth(path: Path) -> PthFile:
    """Opens a file of torch.save's; reads its directory and its pickle, and no weights.

    Raises FormatError for a file that is damaged, hostile, or of another kind; UnsupportedError for TorchScript
    archives, torch's formats before 1.6, and tensors that are sparse, quantized or conjugated.
    """
    with in_file(path):
        file = SourceFile(path, path.stat().st_size)
        _refuse_others(file)
        try:
            records = torch_zip.read_records(file)
        except torch_zip.TruncatedError as error:
            raise _needing(file, error) from None
        _check_records(file, records)
        tensors: dict[str, FileTensor] = {}
        others: dict[str, object] = {}
        for name, value in _values(file, records[PICKLE]):
            if name in tensors or name in others:
                raise FormatError(f"two of its values are called {name!r}")
            if isinstance(value, StoredTensor):
                tensors[name] = _placed(name, value, records, file)
            elif isinstance(value, Storage):
                raise UnsupportedError("is a storage, not a tensor", where=f"value {name!r}")
            else:
                others[name] = value.name if isinstance(value, Symbol) else value
        return PthFile(file, tensors, others)


def _refuse_others(file: SourceFile) -> None:
    """Raises an error for what is no zip, by the name of what it is."""
    head = torch_zip.read(file, 0, min(file.size, 512))
    refuse_impostor(head, file.size)
    if LEGACY.match(head):
        raise UnsupportedError("a file of torch.save before version 1.6, which is no zip", todo=RESAVE)
    if head[257:262] == TAR:
        raise UnsupportedError(
            "a tar archive, perhaps of torch before 0.2", todo="Save it again with torch 1.6 or later"
        )
    if head[:1] == b"\x80":
        raise FormatError("a bare pickle, not a zip file as torch.save writes it", todo=RESAVE)
    if head[:4] != ZIP:
        raise FormatError(f"not a zip file as torch.save writes it: it begins with {head[:8]!r}")


def _needing(file: SourceFile, truncated: torch_zip.TruncatedError) -> FormatError:
    """The error for a zip that breaks off, with the size that it needs where its pickle, which comes first, says it."""
    try:
        offset = torch_zip.first_data_offset(file, PICKLE)
        value, end = read_pickle(torch_zip.read(file, offset, min(file.size - offset, MAX_PICKLE)))
        storages = {t.storage.key: t.storage for _, t in _named(value, end) if isinstance(t, StoredTensor)}
    except LlamatoolsError:
        return truncated
    needed = offset + end + sum(storage.nbytes for storage in storages.values())
    if needed <= file.size:
        return truncated
    return FormatError(
        f"its tensors make it at least {needed} bytes long, but the file ends at {file.size}", todo=truncated.todo
    )


def _check_records(file: SourceFile, records: Mapping[str, Record]) -> None:
    for name in records:
        if not RECORDS.fullmatch(name):
            raise FormatError(f"a checkpoint has no record {name!r}")
    for name in (PICKLE, "version"):
        if name not in records:
            raise FormatError(f"record {name!r} is missing", todo="It is not a checkpoint as torch.save writes it")
    version = _short_text(file, records, "version")
    if not version.isdecimal() or int(version) not in VERSIONS:
        raise UnsupportedError(f"is {version!r}; versions 1 to 10 are known", where="record 'version'")
    order = _short_text(file, records, "byteorder") if "byteorder" in records else "little"
    if order != "little":
        raise UnsupportedError(f"is {order!r}; only little-endian weights are read", where="record 'byteorder'")


def _short_text(file: SourceFile, records: Mapping[str, Record], name: str) -> str:
    record = records[name]
    if record.size > 16:
        raise FormatError(f"has {record.size} bytes; at most 16 are expected", where=f"record {name!r}")
    return torch_zip.read(file, record.offset, record.size).decode("latin1").strip()


def _values(file: SourceFile, record: Record) -> Iterator[tuple[str, Any]]:
    """What the pickle holds, by name."""
    if record.size > MAX_PICKLE:
        raise FormatError(f"a pickle of {record.size} bytes; at most {MAX_PICKLE} are read")
    data = torch_zip.read(file, record.offset, record.size)
    if record.crc:  # 0 where torch was told to compute none
        torch_zip.check_crc(PICKLE, record, zlib.crc32(data))
    value, end = read_pickle(data)
    if end != len(data):
        raise FormatError(f"{len(data) - end} bytes follow the end of the pickle")
    return _named(value, end)


def _named(value: object, nbytes: int) -> Iterator[tuple[str, Any]]:
    """What is inside of dicts, lists and tuples, by its path, in order.

    nbytes: of the pickle. It bounds the number of values, since containers may share parts and hold themselves.
    """
    if not isinstance(value, dict):
        raise FormatError(f"it holds a {kind_of(value)}, not a dict of tensors", todo="Save the model's state_dict()")
    n_values = n_characters = 0

    def inside(
        container: dict[Any, Any] | list[Any] | tuple[Any, ...], path: str, depth: int
    ) -> Iterator[tuple[str, Any]]:
        nonlocal n_values, n_characters
        if depth > MAX_DEPTH:
            raise FormatError(f"dicts and lists lie more than {MAX_DEPTH} deep in each other")
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            name = f"{path}{key}"
            n_values += 1
            n_characters += len(name)
            if n_values > nbytes or n_characters > MAX_NAMES:
                raise FormatError(f"a pickle of {nbytes} bytes that repeats itself to more than {n_values - 1} values")
            if isinstance(value, dict | list | tuple):
                yield from inside(value, f"{name}.", depth + 1)
            else:
                yield name, value

    yield from inside(value, "", 1)


def _placed(name: str, tensor: StoredTensor, records: Mapping[str, Record], file: SourceFile) -> FileTensor:
    """The tensor in the file. Raises FormatError unless every weight of it lies inside its storage's record."""
    where = f"tensor {name!r}"
    storage, itemsize = tensor.storage, tensor.dtype.block_nbytes
    record_name = f"data/{storage.key}"
    record = records.get(record_name)
    if record is None:
        raise FormatError(f"its storage, record {record_name!r}, is missing", where=where)
    if storage.nbytes != record.size:
        raise FormatError(
            f"its storage should have {storage.nbytes} bytes, but record {record_name!r} has {record.size}", where=where
        )
    n_weights = prod(tensor.shape)
    if prod(n for n in tensor.shape if n) * itemsize >= 1 << 63:
        raise FormatError(f"no tensor can have the shape {list(tensor.shape)}", where=where)
    if not n_weights:
        return FileTensor(name, tensor.dtype, tensor.shape, file, record.offset)
    end = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)) + 1
    if end * itemsize > record.size:
        raise FormatError(
            f"it ends at byte {end * itemsize} of its storage, which has {record.size} bytes", where=where
        )
    if n_weights * itemsize > max(record.size, MAX_REPEATED):
        raise FormatError(
            f"it repeats the {record.size} bytes of its storage to {n_weights * itemsize} bytes",
            where=where,
            todo=f"Tensors that repeat their weights are read up to {MAX_REPEATED} bytes",
        )
    offset = record.offset + tensor.offset * itemsize
    return FileTensor(name, tensor.dtype, tensor.shape, file, offset, tensor.strides)
