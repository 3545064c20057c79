"""The oracle of tokenizers: what the original's own `tokenizer.model` makes of a text, by its makers' libraries.

It takes the file's bytes to sentencepiece or tiktoken, and nothing of llamatools' reader of that file. A tiktoken file
is text, `base64 rank` on each line; where tiktoken is not installed, merging by rank is short enough to write out.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from llamatools.errors import FormatError, in_file

Ranks = dict[bytes, int]

# Llama 3's, from llama-models' models/llama3/tokenizer.py.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def original_encoder(path: Path) -> Callable[[str], list[int]]:
    """How the original encodes a text: BOS, then its tokens; special tokens in the text are text.

    Raises FormatError for a file that is neither a SentencePiece model nor a tiktoken file.
    """
    with in_file(path):
        content = path.read_bytes()
        return _tiktoken(content) if RANK_LINE.match(content) else _sentencepiece(content)


def _sentencepiece(content: bytes) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise FormatError("neither a SentencePiece model nor a tiktoken file") from error
    return lambda text: [processor.bos_id(), *processor.encode(text)]


def _tiktoken(content: bytes) -> Callable[[str], list[int]]:
    ranks: Ranks = {}
    for n, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise FormatError("not a token in base64 and its rank", where=f"line {n}") from error
    missing = set(range(len(ranks))) - set(ranks.values()) or {
        byte for byte in range(256) if bytes([byte]) not in ranks
    }
    if missing:
        raise FormatError(f"not a whole vocabulary: of {len(ranks)} tokens, rank or byte {min(missing)} is missing")
    bos = len(ranks)  # <|begin_of_text|>, the first of the special tokens, which follow the ranks
    encode = _by_library(ranks) or _by_rank(ranks)
    return lambda text: [bos, *encode(text)]


def _by_library(ranks: Ranks) -> Callable[[str], list[int]] | None:
    try:
        from tiktoken import Encoding
    except ImportError:
        return None
    return Encoding("original", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}).encode_ordinary


def _by_rank(ranks: Ranks) -> Callable[[str], list[int]]:
    """Cuts the text by the pattern, then merges in each piece the neighbours of the lowest rank until none is left."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    split = Split(Regex(PATTERN), "isolated")

    def merge(piece: bytes) -> list[int]:
        if piece in ranks:  # some tokens cannot be reached by merging
            return [ranks[piece]]
        parts = [bytes([byte]) for byte in piece]
        while True:
            merged = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
            if not merged or min(merged) == len(ranks):
                return [ranks[part] for part in parts]
            at = merged.index(min(merged))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    return lambda text: [i for piece, _ in split.pre_tokenize_str(text) for i in merge(piece.encode())]
