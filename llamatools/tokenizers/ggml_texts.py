"""Vocabularies of the formats before GGUF: texts as they would be printed, restored to SentencePiece's spelling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import BYTE, CONTROL, NORMAL, UNKNOWN, Tokenizer

RAW_BYTES = [bytes([byte]).decode("utf-8", "surrogateescape") for byte in range(256)]
PRINTED = [" ⁇ ", "", "", *RAW_BYTES]  # how the first tokens of every LLaMA 1 and 2 stand there
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]  # and in SentencePiece


def from_texts(texts: Sequence[str], scores: NDArray[np.float32]) -> Tokenizer | None:
    """The vocabulary of a ggmf or ggjt file, None where it does not begin as LLaMA's does.

    Their writers put a space for U+2581, the raw byte for a byte token, nothing for a control token (llama.cpp's
    convert-pth-to-ggml.py of March 2023).
    """
    n = len(PRINTED)
    texts = list(texts)
    if texts[:n] != PRINTED:
        return None
    types = np.full(len(texts), NORMAL, np.int32)
    types[0], types[1:3], types[3:n] = UNKNOWN, CONTROL, BYTE
    return Tokenizer(
        model="llama",
        pre="default",
        tokens=[*PIECES, *(text.replace(" ", "▁") for text in texts[n:])],
        scores=scores,
        types=types,
        special={"unknown": 0, "bos": 1, "eos": 2},
    )
