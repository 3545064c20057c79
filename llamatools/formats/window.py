"""Reading a file's header in order, by `pread`, in windows that grow as it turns out longer.

A header says how long its parts are, and may lie. So nothing is read or allocated beyond what the file has and no
header needs more than.
"""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError

STEP = 1 << 20  # bytes read at least at once
CAPACITY = 16 << 20  # bytes set aside at first: one vocabulary; what is never read into takes no memory
MAX_NBYTES = 256 << 20  # of a header; a vocabulary of 200,000 tokens takes about 17 MB


class Window:
    """The first bytes of a file, as many as were needed so far.

    at: where the next read begins. `where` names, in the errors of the methods, the place in the file that asks.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._size, self._end = fd, size, 0
        self._buffer = np.empty(min(size, CAPACITY), np.uint8)
        self.at = 0

    def peek(self, n: int) -> NDArray[np.uint8]:
        """The next `n` bytes, or fewer at the end of the file, as a view that is good until more is read."""
        end = min(self.at + n, self._size)
        self._reach(end)
        return self._buffer[self.at : end]

    def skip(self, n: int, where: str) -> int:
        """Goes `n` bytes on, which have then been read; returns where they begin."""
        start, end = self.at, self.at + n
        if end > self._end:
            self._require(end, where)
            self._reach(end)
        self.at = end
        return start

    def at_end(self) -> bool:
        """Whether the file has no byte more."""
        return self.at == self._size

    def announce(self, n: int, nbytes_each: int, what: str, where: str) -> None:
        """`n` parts of at least `nbytes_each` bytes are to follow. Raises FormatError where they cannot."""
        left = min(self._size, MAX_NBYTES) - self.at
        if n * nbytes_each > left:
            raise FormatError(
                f"{n} {what} of {nbytes_each} bytes or more are announced, but at most {left} bytes can follow",
                where=where,
                todo="The file is damaged or truncated",
            )

    def unpack(self, fields: str, where: str) -> tuple[Any, ...]:
        """The next bytes as `struct` unpacks them."""
        start = self.skip(struct.calcsize(fields), where)
        return struct.unpack_from(fields, self._buffer.data, start)

    def take(self, n: int, where: str) -> bytes:
        """The next `n` bytes."""
        return self.since(self.skip(n, where))

    def since(self, start: int) -> bytes:
        """The bytes from `start` to where the window is now."""
        return self._buffer[start : self.at].tobytes()

    def numbers(self, dtype: str, n: int, where: str) -> NDArray[Any]:
        """The next `n` numbers as an array (n,) of its own."""
        return np.frombuffer(self.take(n * np.dtype(dtype).itemsize, where), dtype)

    def _require(self, end: int, where: str) -> None:
        if end > self._size:
            raise FormatError(
                f"bytes {self.at} to {end} are needed, but the file ends at {self._size}",
                where=where,
                todo="The file is probably truncated",
                code="truncated",
                span=(self._size, end),
            )
        if end > MAX_NBYTES:
            raise FormatError(f"the header reaches byte {end}, where {MAX_NBYTES} are allowed", where=where)

    def _reach(self, end: int) -> None:
        """Reads up to `end` or somewhat further; the file must have that much."""
        if end <= self._end:
            return
        end = min(max(end, self._end + STEP), self._size)
        if end > len(self._buffer):
            grown = np.empty(min(2 * end, self._size), np.uint8)
            grown[: self._end] = self._buffer[: self._end]
            self._buffer = grown
        while self._end < end:
            n = os.preadv(self._fd, [self._buffer[self._end : end].data], self._end)
            if n == 0:
                raise FormatError(
                    f"it had {self._size} bytes, but now ends at {self._end}", todo="It changed while it was read"
                )
            self._end += n
