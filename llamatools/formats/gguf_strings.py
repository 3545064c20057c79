"""Finding the strings of a GGUF array without a step of Python for each, since a vocabulary has 100,000 of them.

Each string is a u64 length and that many bytes, so where one begins depends on all before it. But nearly every length
is below 65,536: six zero bytes, which text does not contain. All places with six zero bytes are found at once, and then
the whole chain is verified at once: each string must begin where the one before it ends. Where that fails (empty
strings, zeros in a text, lengths of 65,536 and more) the chain is walked.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

Chain = tuple[NDArray[np.int64], NDArray[np.int64]]  # where each text starts and ends


def chain_of_strings(window: bytes, at: int, n: int) -> Chain | None:
    """The n strings that begin at byte `at` of `window`; None where they run past its end."""
    if n == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    found = _find(np.frombuffer(window, np.uint8)[at:], n)
    if found is None:
        return walk(window, at, n)
    starts, ends = found[0] + at, found[1] + at
    return (starts, ends) if len(starts) == n and ends[-1] <= len(window) else None


def _find(data: NDArray[np.uint8], n: int) -> Chain | None:
    """The strings of the chain, as many of the n as lie in `data`; None where they cannot be told by their zeros."""
    zero = data == 0
    two = zero[:-1] & zero[1:]
    four = two[:-2] & two[2:]
    six = four[:-2] & two[4:]
    runs_end = np.flatnonzero(six[:-1] & ~six[1:])  # a short length has seven zeros: two places, of which the last
    lengths_at = (runs_end - 2)[:n]
    if not len(lengths_at) or lengths_at[0] != 0:
        return None
    lengths = data[lengths_at].astype(np.int64) + 256 * data[lengths_at + 1].astype(np.int64)
    starts = lengths_at + 8
    ends = starts + lengths
    return (starts, ends) if np.array_equal(starts[1:], ends[:-1] + 8) else None


def walk(window: bytes, at: int, n: int) -> Chain | None:
    """The same, one string after the other."""
    starts = []
    ends = []
    unpack, size = struct.Struct("<Q").unpack_from, len(window)
    for _ in range(n):
        if at + 8 > size:
            return None
        start = at + 8
        at = start + unpack(window, at)[0]
        if at > size:
            return None
        starts.append(start)
        ends.append(at)
    return np.array(starts, np.int64), np.array(ends, np.int64)
