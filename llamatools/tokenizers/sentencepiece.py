"""`tokenizer.model` of LLaMA 1, Llama 2 and Code Llama: a SentencePiece model, read by a small strict reader.

The file is a protobuf message (google/sentencepiece, sentencepiece_model.proto). What is read of it:

    ModelProto      1 pieces (repeated), 2 trainer_spec, 3 normalizer_spec
    SentencePiece   1 piece, 2 score (float), 3 type
    TrainerSpec     3 model_type, 35 byte_fallback, 40 unk_id, 41 bos_id, 42 eos_id, 43 pad_id
    NormalizerSpec  2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

import numpy as np

from ..checkpoint import BYTE, NORMAL, Tokenizer
from ..errors import FormatError, UnsupportedError

MAX_PIECE_NBYTES = 1024
MAX_PIECES = 1 << 20
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; the others are groups, which nothing here uses
BPE = 2  # TrainerSpec.ModelType

NO_MODEL = "It is truncated, or no SentencePiece model"

Field = tuple[int, int, int | bytes]  # number, wire type, value

# What llama.cpp does with a vocabulary of this kind, so what the file must ask for. field -> (default, wanted)
TRAINER_NEEDS = {"model_type": (3, 1, BPE), "byte_fallback": (35, 0, 1)}
NORMALIZER_NEEDS = {"remove_extra_whitespaces": (4, 1, 0), "escape_whitespaces": (5, 1, 1)}

# Ids of the tokens that have a role: role -> (field of TrainerSpec, default); -1 is none.
ROLE_IDS = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}

# Infill tokens of Code Llama, by their text. Other readers look for these too, but in ASCII spelling.
ROLES_BY_PIECE = {"▁<PRE>": "fim_pre", "▁<SUF>": "fim_suf", "▁<MID>": "fim_mid", "▁<EOT>": "eot"}


def read_sentencepiece(data: bytes) -> Tokenizer:
    """The vocabulary in a SentencePiece model of the BPE kind.

    Raises FormatError for what is no such model, UnsupportedError for one that other readers would get wrong.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, _, value in _fields(data, "the model"):
        if number == 1:
            if len(pieces) == MAX_PIECES:
                raise FormatError(f"over {MAX_PIECES} pieces")
            pieces.append(_piece(value, f"piece {len(pieces)}"))
        elif number == 2:
            trainer = {n: v for n, _, v in _fields(value, "trainer_spec")}
        elif number == 3:
            normalizer = {n: v for n, _, v in _fields(value, "normalizer_spec")}
    if not pieces:
        raise FormatError("no pieces in it", todo="It is no SentencePiece model")
    for spec, needs in ((trainer, TRAINER_NEEDS), (normalizer, NORMALIZER_NEEDS)):
        for name, (number, default, wanted) in needs.items():
            stated = spec.get(number, default)
            if stated != wanted:
                raise UnsupportedError(f"{name} is {stated!r}, but LLaMA's tokenizers have {wanted}")
    if normalizer.get(2):
        raise UnsupportedError("it normalizes text by a table of characters, which GGUF cannot say")
    texts, scores, types = zip(*pieces, strict=True)
    special = {}
    for role, (number, default) in ROLE_IDS.items():
        id_ = _signed(trainer.get(number, default))
        if id_ >= len(pieces):
            raise FormatError(f"{id_}, but there are {len(pieces)} pieces", where=f"id of {role!r}")
        if id_ >= 0:
            special[role] = id_
    for id_, text in enumerate(texts):
        if text in ROLES_BY_PIECE:
            special.setdefault(ROLES_BY_PIECE[text], id_)
    return Tokenizer(
        model="llama",
        pre="default",
        tokens=list(texts),
        scores=np.array(scores, np.float32),
        types=np.array(types, np.int32),
        special=special,
        add_space_prefix=bool(normalizer.get(3, 1)),
    )


# A piece as all writers write it: text (shorter than 128 bytes), score and, where it is not NORMAL, type.
USUAL_PIECE = re.compile(rb"\x0a([\x01-\x7f])(.+)\x15(.{4})(?:\x18([\x01-\x06]))?", re.DOTALL)
SCORE = struct.Struct("<f")


def _piece(message: int | bytes, where: str) -> tuple[str, float, int]:
    """Text, score and type of a piece."""
    usual = USUAL_PIECE.fullmatch(message) if isinstance(message, bytes) else None
    if usual:
        length, text, score, type_ = usual.groups()
        if length[0] == len(text):  # else it only looks like one
            return _decoded(text, where), SCORE.unpack(score)[0], type_[0] if type_ else NORMAL
    text, score, type_ = b"", 0.0, NORMAL
    for number, wire, value in _fields(message, where):
        if number == 1 and isinstance(value, bytes):
            text = value
        elif number == 2 and wire == FIXED32 and isinstance(value, bytes):
            (score,) = SCORE.unpack(value)
        elif number == 3 and isinstance(value, int):
            type_ = value
    if not 0 < len(text) <= MAX_PIECE_NBYTES:
        raise FormatError(f"a text of {len(text)} bytes, where 1 to {MAX_PIECE_NBYTES} are allowed", where=where)
    if not NORMAL <= type_ <= BYTE:
        raise FormatError(f"type {type_}, where {NORMAL} to {BYTE} are known", where=where)
    return _decoded(text, where), score, type_


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"its text is not UTF-8 at byte {error.start}", where=where) from error


def _fields(message: int | bytes, where: str) -> Iterator[Field]:
    """The fields of a protobuf message in order. Raises FormatError where it is none."""
    if not isinstance(message, bytes):
        raise FormatError("a number where a message is required", where=where)
    at = 0
    while at < len(message):
        tag, at = _varint(message, at, where)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(message, at, where)
            yield number, wire, value
            continue
        if wire == BYTES:
            n, at = _varint(message, at, where)
        elif wire in (FIXED32, FIXED64):
            n = 4 if wire == FIXED32 else 8
        else:
            raise FormatError(f"wire type {wire} of field {number} at byte {at}", where=where, todo=NO_MODEL)
        if n > len(message) - at:
            raise FormatError(
                f"field {number} needs bytes {at} to {at + n} of {len(message)}", where=where, todo=NO_MODEL
            )
        yield number, wire, message[at : at + n]
        at += n


def _varint(message: bytes, at: int, where: str) -> tuple[int, int]:
    """A number of 7 bits a byte, and where the next field begins."""
    if at < len(message) and message[at] < 0x80:  # most are of one byte
        return message[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at == len(message):
            raise FormatError(f"a number is cut off at byte {at}", where=where, todo=NO_MODEL)
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise FormatError(f"a number of over 10 bytes before byte {at}", where=where, todo=NO_MODEL)


def _signed(value: int | bytes) -> int:
    """An int32, which protobuf writes as 64 bits."""
    number = value if isinstance(value, int) else -1
    return number - (1 << 64) if number >> 63 > 0 else number
