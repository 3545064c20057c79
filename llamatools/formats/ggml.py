"""Reading llama.cpp's formats before GGUF, of March to August 2023: ggml, ggmf v1, and ggjt v1 to v3.

    u32 magic  u32 version (not in ggml)
    u32 n_vocab  u32 n_embd  u32 n_mult  u32 n_head  u32 n_layer  u32 n_rot  u32 ftype
    per token:   u32 length, that many bytes, f32 score (not in ggml)
    per tensor:  u32 axes, u32 length of the name, u32 type, u32 length of each axis (fastest first), the name,
                 in ggjt: padding up to a multiple of 32 bytes from the start of the file; the data

All little-endian, so the magics stand in the file as `lmgg`, `fmgg` and `tjgg`. Nothing says how many tensors follow:
they go on to the end of the file, and that all are there follows from n_layer. Names are Meta's. Until ggjt, models
from 13B on were cut as Meta's shards are, into `f.bin`, `f.bin.1` and so on, each with header and vocabulary.
What a type number means depends on the version (dtypes/eras.py). Source: llama.cpp's history, and what it has kept of
it, convert_llama_ggml_to_gguf.py. Stricter here: the names must be a LLaMA's, each once, and all of them.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import names
from ..checkpoint import Note
from ..dtypes import BY_ID, DType
from ..dtypes.eras import GGJT_V1, GGJT_V2, OF_64, UNVERSIONED, nbytes_by_64
from ..errors import FormatError, LlamatoolsError, Report, UnsupportedError, in_file, naming, refuse
from ..layout import File, Layout, PlacedTensor
from ..metadata import Kind, Strings, Value, array, strings, u32
from ..tensors import FileTensor, SourceFile
from ..tokenizers import ggml_texts
from .gguf_write import check_rows, padded
from .window import Window

ALIGNMENT = 32  # of tensors in ggjt
FIELDS = ("n_vocab", "n_embd", "n_mult", "n_head", "n_layer", "n_rot", "ftype")
MAX_LAYERS = 1024
MAX_TOKEN_NBYTES = 1024
MAX_AXES = 2
MAX_NAME_NBYTES = 255
MAX_ENTRY_NBYTES = 12 + 4 * MAX_AXES + MAX_NAME_NBYTES
CUT = "The file is probably truncated"
LORA = b"algg"  # llama.cpp's adapters of that time

# Numbers that mean what they mean today: in every era, from ggjt v2 on, in ggjt v3.
PLAIN = {n: BY_ID[n] for n in (0, 1)}
SINCE_V2 = PLAIN | {n: BY_ID[n] for n in (6, 7)}
SINCE_V3 = SINCE_V2 | {n: BY_ID[n] for n in (2, 3, 8, 10, 11, 12, 13, 14)}


@dataclass(frozen=True)
class Format:
    """One of the formats. version: what the file must say, None where it says none. types: by ggml's number."""

    name: str
    magic: bytes
    version: int | None
    types: dict[int, DType]

    @property
    def has_scores(self) -> bool:
        return self.version is not None

    @property
    def alignment(self) -> int | None:
        return ALIGNMENT if self.magic == b"tjgg" else None


FORMATS = (
    Format("ggml", b"lmgg", None, PLAIN | UNVERSIONED),
    Format("ggmf v1", b"fmgg", 1, PLAIN | GGJT_V1),
    Format("ggjt v1", b"tjgg", 1, PLAIN | GGJT_V1),
    Format("ggjt v2", b"tjgg", 2, SINCE_V2 | GGJT_V2),
    Format("ggjt v3", b"tjgg", 3, SINCE_V3),
)
MAGICS = {format.magic: format.name.partition(" ")[0] for format in FORMATS}


def is_ggml(head: bytes) -> bool:
    """Whether a file that begins so is in one of these formats, perhaps with its bytes in the other order."""
    magic = head[:4]
    return magic in MAGICS or magic == LORA or _is_big_endian(head)


def read_ggml(path: Path, *, report: Report = refuse) -> Layout:
    """The layout of a file, or of all its parts where it is one of several; the tensors as each part has them.

    report: is told what is wrong behind the vocabulary; unless it raises, the layout has what is there.
    Hyperparameters stay None, since the header has no context, norm_eps or rope_theta; what it says is metadata.
    Raises FormatError for a file that is damaged, truncated or hostile, or a missing part, UnsupportedError for other
    versions and the other byte order.
    """
    with in_file(path):
        first = _read(path, naming(path, report))
        n_parts = _n_parts(first)
    if n_parts == 1:
        return _explained(first)
    numbered = re.fullmatch(r"(.+)\.([1-7])", path.name, re.DOTALL)
    base = path.with_name(numbered[1]) if numbered and int(numbered[2]) < n_parts else path
    paths = [base, *(base.with_name(f"{base.name}.{n}") for n in range(1, n_parts))]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        listed = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
        what = f"it is one of {n_parts} parts, of which {listed} missing"
        report(FormatError(what, file=path, todo="Put all parts into one folder", code="shard-missing"))
    parts = []
    for part in paths:
        if part.name not in missing:
            with in_file(part):
                parts.append(first if part == path else _read(part, naming(part, report)))
                _require_alike(parts[0], parts[-1])
    tensors = (replace(tensor, file=n) for n, part in enumerate(parts) for tensor in part.tensors)
    files = tuple(file for part in parts for file in part.files)
    return _explained(replace(parts[0], files=files, tensors=tuple(tensors)))


def _read(path: Path, report: Report) -> Layout:
    """One file as it is."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        window = Window(file.fileno(), size)
        format = _read_format(window)
        header = dict(zip(FIELDS, window.unpack(f"<{len(FIELDS)}I", "header"), strict=True))
        if not 0 < header["n_layer"] <= MAX_LAYERS:
            raise FormatError(f"{header['n_layer']} layers, where 1 to {MAX_LAYERS} are allowed", where="header")
        metadata = {name: u32(number) for name, number in header.items()}
        metadata |= _read_vocabulary(window, header["n_vocab"], format.has_scores)
        tensors: list[PlacedTensor] = []
        stopped_at = None
        try:
            for tensor in _read_tensors(file.fileno(), window.at, format, SourceFile(path, size), header["n_layer"]):
                tensors.append(tensor)  # one by one: those before an error are kept
        except FormatError as error:
            report(error)
            if error.code != "truncated":
                stopped_at = tensors[-1].end if tensors else window.at
    files = (File(path, size),)
    return Layout(format.name, files, tuple(tensors), metadata, format.alignment, stopped_at=stopped_at)


def _read_format(window: Window) -> Format:
    head = window.peek(8).tobytes()
    if head[:4] == LORA:
        raise UnsupportedError("a LoRA adapter in llama.cpp's format of 2023, which is no model")
    if _is_big_endian(head):
        raise UnsupportedError(f"a big-endian {head[:4].decode()} file", todo="Little-endian ones are read")
    if head[:4] not in MAGICS:
        raise FormatError(f"no ggml, ggmf or ggjt file: it begins with {head[:4]!r}")
    window.skip(4, "header")
    if head[:4] == FORMATS[0].magic:
        return FORMATS[0]
    (version,) = window.unpack("<I", "header")
    for format in FORMATS:
        if (format.magic, format.version) == (head[:4], version):
            return format
    known = [str(format.version) for format in FORMATS if format.magic == head[:4]]
    raise UnsupportedError(f"{MAGICS[head[:4]]} version {version}", todo=f"Known are {', '.join(known)}")


def _is_big_endian(head: bytes) -> bool:
    """Whether a magic is spelled as its name reads, and followed by a number below 2^24 in the same order."""
    return head[3::-1] in MAGICS and head[4:5] == b"\0"


def _read_vocabulary(window: Window, n: int, has_scores: bool) -> dict[str, Value]:
    """The texts of all tokens, and their scores, as they stand in the file."""
    window.announce(n, 8 if has_scores else 4, "tokens", "vocabulary")
    start = window.at
    starts, lengths = np.empty(n, np.int64), np.empty(n, np.int64)
    for id_ in range(n):
        (length,) = window.unpack("<I", f"token {id_}")
        if length > MAX_TOKEN_NBYTES:
            raise FormatError(
                f"a text of {length} bytes, where {MAX_TOKEN_NBYTES} are allowed",
                where=f"token {id_}",
                todo="The file is damaged, or no LLaMA: other models have other headers under the same magic",
            )
        starts[id_] = window.skip(length + 4 * has_scores, f"token {id_}") - start
        lengths[id_] = length
    data = window.since(start)
    keys = {"tokens": strings(Strings(data, starts, starts + lengths))}
    if has_scores:
        at = (starts + lengths)[:, None] + np.arange(4)
        scores = np.frombuffer(data, np.uint8)[at].view("<f4")[:, 0] if n else np.empty(0, "<f4")
        keys["scores"] = array(Kind.FLOAT32, scores)
    return keys


def _read_tensors(fd: int, at: int, format: Format, source: SourceFile, n_layers: int) -> Iterator[PlacedTensor]:
    """The tensors from byte `at` to the end of the file: all of a LLaMA's, or none.

    A file that was cut between two tensors is sound in every other way.
    """
    wanted = names.meta_names(n_layers)
    missing = dict.fromkeys(wanted)
    tensor = None
    while at < source.size:
        try:
            tensor = _read_tensor(fd, at, format, source)
        except LlamatoolsError:
            if tensor and _is_by_64(fd, tensor, format, source, wanted):
                raise UnsupportedError(OF_64, where=f"tensor {tensor.name!r}", todo="Make the file anew") from None
            raise
        where = f"tensor {tensor.name!r}"
        if tensor.name not in missing:
            if tensor.name in wanted:
                raise FormatError("two tensors have this name", where=where, code="tensor-twice")
            what = f"a LLaMA of {n_layers} layers has none of this name"
            raise FormatError(what, where=where, todo="It is of another model", code="tensor-name")
        del missing[tensor.name]
        yield tensor
        at = tensor.end
        if at > source.size:
            raise FormatError(
                f"its data is bytes {tensor.offset} to {at}, but the file ends at {source.size}",
                where=where,
                todo=CUT,
                code="truncated",
                span=(source.size, at),
            )
    if 0 < len(missing) < len(wanted):
        what = f"{len(missing)} of {len(wanted)} tensors are missing, from {next(iter(missing))!r} on"
        raise FormatError(what, todo=CUT, code="truncated")


def _read_tensor(fd: int, at: int, format: Format, source: SourceFile) -> PlacedTensor:
    """The tensor whose entry begins at byte `at`."""
    entry, where = os.pread(fd, MAX_ENTRY_NBYTES, at), f"the tensor at byte {at}"

    def unpack(fields: str, start: int) -> tuple[Any, ...]:
        end = start + struct.calcsize(fields)
        if end > len(entry):
            raise FormatError(
                f"bytes {at + start} to {at + end} are needed, but the file ends at {at + len(entry)}",
                where=where,
                todo=CUT,
                code="truncated",
            )
        return struct.unpack_from(fields, entry, start)

    n_axes, name_nbytes, id_ = unpack("<3I", 0)
    if not (1 <= n_axes <= MAX_AXES and 1 <= name_nbytes <= MAX_NAME_NBYTES):
        raise FormatError(
            f"{n_axes} axes and a name of {name_nbytes} bytes, where 1 to {MAX_AXES} and 1 to {MAX_NAME_NBYTES} are "
            "allowed",
            where=where,
            todo="The file is damaged, or the tensor before it was written in other blocks than its version has",
        )
    *lengths, name_bytes = unpack(f"<{n_axes}I{name_nbytes}s", 12)
    name, shape = name_bytes.decode("utf-8", "surrogateescape"), tuple(reversed(lengths))
    where = f"tensor {name!r}"
    if id_ not in format.types:
        raise UnsupportedError(f"weights of type {id_}, which {format.name} does not have", where=where)
    dtype = format.types[id_]
    check_rows(dtype, shape, where)
    begin = padded(at + 12 + 4 * n_axes + name_nbytes, format.alignment or 1)
    tensor = FileTensor(name, dtype, shape, source, begin)
    return PlacedTensor(name, dtype, shape, begin, tensor.nbytes, source=tensor)


def _is_by_64(fd: int, tensor: PlacedTensor, format: Format, source: SourceFile, wanted: Collection[str]) -> bool:
    """Whether a tensor's super-blocks hold 64 weights: then the file, or the next tensor, is where they end."""
    nbytes = nbytes_by_64(tensor.dtype, tensor.n_weights)
    if nbytes is None:
        return False
    end = tensor.offset + nbytes
    try:
        return end == source.size or _read_tensor(fd, end, format, source).name in wanted
    except LlamatoolsError:
        return False


def _number(layout: Layout, field: str) -> int:
    return int(layout.metadata[field].data)


def _n_parts(layout: Layout) -> int:
    """How many files the model was cut into: before ggjt each had some columns of the embedding."""
    shape = next((tensor.shape for tensor in layout.tensors if tensor.name == names.EMBEDDING), None)
    if shape is None:
        return 1
    wanted = (_number(layout, "n_vocab"), _number(layout, "n_embd"))
    if len(shape) == 2 and shape[0] == wanted[0] and shape[1] and wanted[1] in {shape[1] * n for n in (1, 2, 4, 8)}:
        return wanted[1] // shape[1]
    raise FormatError(
        f"shape {list(shape)}, where the header asks for {list(wanted)}, or 1/2, 1/4 or 1/8 of the columns",
        where=f"tensor {names.EMBEDDING!r}",
    )


def _require_alike(first: Layout, part: Layout) -> None:
    """Header, vocabulary and tensors' shapes must be those of the first part."""
    for key, value in first.metadata.items():
        if key not in part.metadata or not np.array_equal(value.data, part.metadata[key].data):
            raise FormatError(f"not what {first.files[0].path.name} says", where=key, todo="It is of another model")
    listed = [{tensor.name: (tensor.dtype, tensor.shape) for tensor in layout.tensors} for layout in (first, part)]
    for name, entry in listed[0].items():
        if listed[1].get(name) != entry:
            raise FormatError(f"not as in {first.files[0].path.name}", where=f"tensor {name!r}")


def _explained(layout: Layout) -> Layout:
    """The layout with its vocabulary as a Tokenizer, and with notes on what the format leaves open."""
    scores = layout.metadata.get("scores")
    tokenizer = None if scores is None else ggml_texts.from_texts(layout.metadata["tokens"].data, scores.data)
    notes = [_shape_note(layout)]
    if not layout.tensors:
        notes.append(Note("tensors", "none", "the file holds a vocabulary only"))
    if scores is None:
        notes.append(Note("scores", "none", "this format has none, so text cannot be encoded by its vocabulary"))
    elif tokenizer is None:
        notes.append(Note("tokenizer", "none", "the vocabulary does not begin as LLaMA's does; its texts are metadata"))
    ambiguous = [dtype.name for dtype in layout.nbytes_by_dtype() if dtype in UNVERSIONED.values()]
    if ambiguous:
        reason = "rows of Q4_0 until 11 March 2023, of Q4_1 until 17 March, were laid out otherwise in as many bytes"
        notes.append(Note("blocks", ", ".join(ambiguous), reason))
    return replace(layout, tokenizer=tokenizer, notes=tuple(notes))


def _shape_note(layout: Layout) -> Note:
    n_layers, dim, n_heads = (_number(layout, field) for field in ("n_layer", "n_embd", "n_head"))
    shape = f"{n_layers} layers, dim {dim}, {n_heads} heads"
    return Note("shape", shape, "the header, which states no context, norm_eps, rope_theta or n_kv_heads")
