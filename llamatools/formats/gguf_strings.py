"""Finding the strings of a GGUF array without a step of Python for each, since a vocabulary has 100,000 of them.

Each string is a u64 length and that many bytes, so where one begins depends on all before it. But nearly every length
is below 65,536 and thus ends in six zero bytes, which text does not contain. So a piece of the file is searched for
all places with six zero bytes at once, and then the whole chain is verified at once: each string must begin where the
one before it ends. Up to the first place where that fails (zeros in a text, empty strings in a row, longer strings) the
strings are certain; some thousands from there on are walked one by one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..metadata import Strings
from .window import Window

PIECE = 128 << 10  # bytes searched at once: the masks made of them stay in cache, and malloc keeps their memory
FEW = 64  # strings that are walked as fast as searched for
WALKED = 4096  # strings walked where a search found few: a file made to defeat the search costs little more


def read_strings(window: Window, n: int, where: str) -> Strings:
    """The next `n` strings, none of them decoded yet. Raises FormatError where the file ends before they do."""
    window.announce(n, 8, "strings", where)
    first = window.at
    starts = np.empty(n, np.int64)
    ends = np.empty(n, np.int64)
    done = 0
    while done < n:
        before = window.at - first
        lengths = certain_lengths(window.peek(PIECE))[: n - done] if n - done > FEW else starts[:0]
        if len(lengths) > FEW:
            window.skip(int(lengths.sum()) + 8 * len(lengths), where)
        else:
            lengths = _walk(window, min(n - done, WALKED), where)
        some = slice(done, done + len(lengths))
        ends[some] = before + np.cumsum(lengths + 8)
        starts[some] = ends[some] - lengths
        done += len(lengths)
    return Strings(window.since(first), starts, ends, as_in_gguf=True)


def certain_lengths(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The lengths of the strings from data[0] on, as many as can be told from their zeros."""
    zero = data == 0
    two = zero[:-1] & zero[1:]
    four = two[:-2] & two[2:]
    six = four[:-2] & two[4:]  # six[i]: data[i] to data[i + 5] are zero
    last = six[:-1] > six[1:]  # a length below 256 has seven zeros, so two places with six, of which the last is meant
    # Strings are 8 bytes apart or more, so a word of 8 truths has one at most; finding those words is much faster.
    words = last[: len(last) // 8 * 8].view("<u8")
    hits = np.flatnonzero(words != 0)
    places: NDArray[np.int64] = 8 * hits + (np.bitwise_count(words[hits] - 1) >> 3) - 2
    if not len(places) or places[0] != 0:
        return places[:0]
    lengths: NDArray[np.int64] = data[places] + 256 * data[places + 1].astype(np.int64)
    broken = np.flatnonzero(places[1:] != (places + 8 + lengths)[:-1])
    return lengths[: broken[0] + 1] if len(broken) else lengths


def _walk(window: Window, n: int, where: str) -> NDArray[np.int64]:
    lengths = []
    for _ in range(n):
        (length,) = window.unpack("<Q", where)
        window.skip(length, where)
        lengths.append(length)
    return np.array(lengths, np.int64)
