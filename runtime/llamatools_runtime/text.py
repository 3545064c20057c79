"""Text to token ids and back, by the libraries sentencepiece and tokenizers, built from a file's own vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llamatools.checkpoint import BYTE, CONTROL, UNKNOWN, USER_DEFINED, Tokenizer
from llamatools.errors import FormatError, UnsupportedError
from llamatools.metadata import Strings

# How byte-level vocabularies cut text into words before merging, by llama.cpp's name of the pre-tokenizer.
# Each is a list of expressions that are applied one after the other.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "llama-bpe": (LLAMA_3,),
    "smollm": (r"\p{N}", GPT_2),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
WHOLE_WORDS = {"llama-bpe"}  # a word that is a token is taken whole, even where no merges lead to it
ENDS = ("eos", "eot", "eom")


class TextCodec:
    """Encodes and decodes text with a model's vocabulary.

    end_ids: the ids that end a text or a turn. Raises UnsupportedError for a vocabulary or pre-tokenizer of another
    kind, FormatError for one that the library refuses.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        makers: dict[str, Callable[[Tokenizer], _Library]] = {"llama": _SentencePiece, "gpt2": _ByteLevel}
        if tokenizer.model not in makers:
            known = " and ".join(repr(model) for model in makers)
            raise UnsupportedError(f"vocabulary of kind {tokenizer.model!r}, where {known} are known")
        self._tokenizer = tokenizer
        self._library = makers[tokenizer.model](tokenizer)
        self.end_ids = frozenset(tokenizer.special[role] for role in ENDS if role in tokenizer.special)

    def encode(
        self, text: str, *, add_bos: bool | None = None, add_eos: bool | None = None, special: bool = False
    ) -> list[int]:
        """The ids of `text`. A lone surrogate in it stands for the replacement character.

        add_bos, add_eos: begin with the id that begins a text, end with the one that ends it; by default as the
        vocabulary says.
        special: take special tokens that are spelled out in the text as such, and not as text.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        begin = self._tokenizer.add_bos if add_bos is None else add_bos
        bos = [self._tokenizer.special["bos"]] if begin and "bos" in self._tokenizer.special else []
        finish = self._tokenizer.add_eos if add_eos is None else add_eos
        end = [self._tokenizer.special["eos"]] if finish and "eos" in self._tokenizer.special else []
        return bos + self._library.encode(text, special) + end

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Special tokens have none; bytes that are not UTF-8 become replacement characters."""
        return self._library.decode(ids)


class _Library(Protocol):
    """What both libraries are asked for."""

    def encode(self, text: str, special: bool) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class _SentencePiece:
    """The library sentencepiece on a model put together from the vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from sentencepiece import SentencePieceProcessor

        self._special = {tokenizer.tokens[n]: n for n in np.flatnonzero(tokenizer.types == CONTROL).tolist()}
        try:
            self._processor = SentencePieceProcessor(model_proto=_model_proto(tokenizer))
        except (RuntimeError, ValueError) as error:
            raise FormatError(f"sentencepiece refuses the vocabulary: {error}") from error

    def encode(self, text: str, special: bool) -> list[int]:
        if not special:
            return self._encode(text)
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, self._special)) or '(?!)'})", text):
            ids += [self._special[piece]] if piece in self._special else self._encode(piece) if piece else []
        return ids

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(id_) for id_ in ids])
        return text


def _model_proto(tokenizer: Tokenizer) -> bytes:
    """A SentencePiece model (sentencepiece_model.proto) with this vocabulary, for BPE with byte fallback."""

    def varint(number: int) -> bytes:
        number &= (1 << 64) - 1
        head = bytearray()
        while number > 0x7F:
            head.append(number & 0x7F | 0x80)
            number >>= 7
        return bytes([*head, number])

    def field(number: int, value: int | bytes) -> bytes:
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        return varint(number << 3 | 2) + varint(len(value)) + value

    t = tokenizer

    def piece(text: str, score: bytes, type_: int) -> bytes:
        """Fields 1, text, 2, score, and 3, type, as field 1 of the model."""
        as_bytes = text.encode("utf-8", "replace")
        return field(1, field(1, as_bytes) + varint(2 << 3 | 5) + score + field(3, type_))

    scores = np.zeros(len(t.tokens), "<f4") if t.scores is None else t.scores.astype("<f4")
    pieces = _pieces_at_once(t, scores) if isinstance(t.tokens, Strings) else None
    if pieces is None:
        pieces = b"".join(map(piece, t.tokens, scores.view("V4").tolist(), t.types.tolist()))
    unknown = int(next(iter(np.flatnonzero(t.types == UNKNOWN)), 0))
    has_bytes = int(BYTE in t.types)
    bos, eos = t.special.get("bos", -1), t.special.get("eos", -1)
    ids = field(40, unknown) + field(41, bos) + field(42, eos) + field(43, -1)
    trainer = field(3, 2) + field(4, len(t.tokens)) + field(35, has_bytes) + ids
    normalizer = field(1, b"identity") + field(3, int(t.add_space_prefix)) + field(4, 0) + field(5, 1)
    return pieces + field(2, trainer) + field(3, normalizer)


def _pieces_at_once(t: Tokenizer, scores: NDArray[np.float32]) -> bytes | None:
    """What `piece` gives for all tokens, at once: whoever starts waits for it, and they are many thousands.

    None where a length or a type does not fit a byte, or a token is no UTF-8.
    """
    assert isinstance(t.tokens, Strings)
    starts, lengths = t.tokens.starts, t.tokens.ends - t.tokens.starts  # (n_tokens,)
    if not len(starts) or lengths.max() > 118 or t.types.min() < 0 or t.types.max() > 127:
        return None
    before = np.cumsum(lengths) - lengths  # (n_tokens,), bytes of the tokens before
    numbers = np.arange(lengths.sum())
    text = np.frombuffer(t.tokens.buffer, np.uint8)[np.repeat(starts - before, lengths) + numbers]
    begins_within_a_character = (text[before[lengths > 0]] & 0xC0) == 0x80
    try:
        text.tobytes().decode()
    except UnicodeDecodeError:
        return None
    if begins_within_a_character.any():
        return None
    at = before + 11 * np.arange(len(starts))
    pieces = np.empty(len(text) + 11 * len(starts), np.uint8)
    pieces[at], pieces[at + 1] = 0x0A, lengths + 9
    pieces[at + 2], pieces[at + 3] = 0x0A, lengths
    pieces[np.repeat(at + 4 - before, lengths) + numbers] = text
    after = at + 4 + lengths
    pieces[after], pieces[after[:, None] + np.arange(1, 5)] = 0x15, scores.view(np.uint8).reshape(-1, 4)
    pieces[after + 5], pieces[after + 6] = 0x18, t.types
    return pieces.tobytes()


class _ByteLevel:
    """The library tokenizers on a byte-level BPE model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Library

        t = tokenizer
        if t.pre not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise UnsupportedError(
                f"pre-tokenizer {t.pre!r}, where {known} are known", where="key 'tokenizer.ggml.pre'"
            )
        merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in t.merges)]
        vocabulary = {text: id_ for id_, text in enumerate(t.tokens)}
        try:
            library = Library(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=t.pre in WHOLE_WORDS))
        except Exception as error:  # the library raises nothing narrower
            raise FormatError(f"tokenizers refuses the vocabulary: {error}") from error
        splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in PRE_TOKENIZERS[t.pre]]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
        library.decoder = decoders.ByteLevel()
        for type_, add in ((CONTROL, library.add_special_tokens), (USER_DEFINED, library.add_tokens)):
            ids = [id_ for id_, found in enumerate(t.types.tolist()) if found == type_]
            add([AddedToken(t.tokens[id_], special=type_ == CONTROL, normalized=False) for id_ in ids])
        self._library: Any = library

    def encode(self, text: str, special: bool) -> list[int]:
        self._library.encode_special_tokens = not special
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._library.decode([int(id_) for id_ in ids], skip_special_tokens=True)
        return text
