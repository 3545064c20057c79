"""Vocabularies: read from `tokenizer.model`, whatever its kind, and from and to GGUF's keys."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..checkpoint import UNUSED, Tokenizer
from ..errors import FormatError, in_file
from ..formats.impostors import refuse_impostor
from .sentencepiece import read_sentencepiece
from .tiktoken import read_tiktoken, with_instruct

MAX_NBYTES = 64 << 20
PADDING_SCORE = -10000.0


def read_tokenizer(path: Path, *, era: str = "3") -> Tokenizer:
    """The vocabulary in `path`, told apart by content: tiktoken's text (Llama 3) or a SentencePiece model (before).

    era: of a tiktoken file, see `read_tiktoken`. Raises FormatError for a file that is neither, or damaged.
    """
    with in_file(path), open(path, "rb") as file:
        data = file.read(MAX_NBYTES + 1)
        if len(data) > MAX_NBYTES:
            raise FormatError(f"over {MAX_NBYTES} bytes, where a vocabulary has a few million")
        refuse_impostor(data[:512], len(data))
        first_line = data[:1500].split(b"\n")[0].split(b" ")
        is_text = len(first_line) == 2 and first_line[1].strip().isdigit()
        tokenizer = read_tiktoken(data, era=era) if is_text else read_sentencepiece(data)
        require_unique(tokenizer)
        return tokenizer


def require_unique(tokenizer: Tokenizer) -> None:
    """Raises FormatError where two tokens have one text: llama.cpp ends the process then."""
    if len(set(tokenizer.tokens)) < len(tokenizer.tokens):
        text, n = Counter(tokenizer.tokens).most_common(1)[0]
        raise FormatError(f"{n} tokens have the text {text!r}, where each must have its own")


def pad_vocab(tokenizer: Tokenizer, n: int) -> Tokenizer:
    """The vocabulary with unused tokens `[PAD5]` and so on up to n in all, named by their id as llama.cpp does."""
    n_more = n - len(tokenizer.tokens)
    texts = [f"[PAD{id_}]" for id_ in range(len(tokenizer.tokens), n)]
    scores = tokenizer.scores
    padded = replace(
        tokenizer,
        tokens=[*tokenizer.tokens, *texts],
        types=np.concatenate([tokenizer.types, np.full(n_more, UNUSED, np.int32)]),
        scores=None if scores is None else np.concatenate([scores, np.full(n_more, PADDING_SCORE, np.float32)]),
    )
    require_unique(padded)
    return padded


__all__ = ["Tokenizer", "pad_vocab", "read_tokenizer", "require_unique", "with_instruct"]
