"""Which pages of a model file are in the page cache now, as mincore(2) tells.

A file is mapped read-only, a window at a time, and none of its pages is touched. What reading the header brought in
just before counts like everything else.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, UnsupportedError, in_file
from ..layout import PlacedTensor

PAGE = mmap.PAGESIZE  # of this machine
WINDOW = 1 << 30  # bytes mapped at a time


@dataclass(frozen=True)
class Residency:
    """Runs of pages of one file that are in the page cache, in bytes.

    starts: (n_runs,) int64, each the first byte of a page. stops: (n_runs,) int64, each behind a page's last byte.
    """

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    def pages(self, tensor: PlacedTensor) -> tuple[int, int]:
        """How many pages hold bytes of a tensor, and how many of those are in the cache."""
        if not tensor.nbytes:
            return 0, 0
        start, stop = tensor.offset // PAGE * PAGE, -(-tensor.end // PAGE) * PAGE
        return (stop - start) // PAGE, self.between(start, stop) // PAGE

    def between(self, start: int, stop: int) -> int:
        """Bytes from start to stop whose pages are in the cache."""
        return int((np.minimum(self.stops, stop) - np.maximum(self.starts, start)).clip(0).sum())

    def shares(self, edges: NDArray[np.int64]) -> NDArray[np.float64]:
        """The part in the cache, 0 to 1, of the bytes between each two neighbours of `edges` (n + 1,) -> (n,)."""
        before = np.concatenate(([0], np.cumsum(self.stops - self.starts)))  # bytes in all runs before each run
        run = np.searchsorted(self.starts, edges, "right")  # runs that begin before the edge
        last = np.maximum(run - 1, 0)
        inside = np.zeros_like(edges)
        if len(self.starts):
            inside = before[last] + np.minimum(edges, self.stops[last]) - self.starts[last]
        resident = np.where(run > 0, inside, 0)
        found: NDArray[np.float64] = np.diff(resident) / np.maximum(np.diff(edges), 1)
        return found


def residency(path: Path) -> Residency:
    """Asks for every page of a file.

    Raises UnsupportedError where the system cannot tell, or tells only those who may write to the file.
    """
    with in_file(path):
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            _check_system(path, status.st_uid)
            bits = [_mincore(file.fileno(), start, size) for start, size in _windows(status.st_size)]
    # A 1 before and behind, so that every run has both edges.
    steps = np.diff(np.concatenate([[0], *bits, [0]]).astype(np.int8))  # (n_pages + 1,)
    starts, stops = (np.flatnonzero(steps == step).astype(np.int64) * PAGE for step in (1, -1))
    return Residency(starts, stops)


def _check_system(path: Path, owner: int) -> None:
    if sys.platform not in ("linux", "darwin"):
        raise UnsupportedError(
            f"which pages are in memory cannot be asked for on {sys.platform}, only on Linux and macOS"
        )
    # To all others, Linux (mm/mincore.c) says of every page that it is there.
    if os.geteuid() not in (0, owner) and not os.access(path, os.W_OK):
        raise UnsupportedError(
            "which of its pages are in memory is told only to its owner and to those who may write to it",
            todo="Ask as its owner",
        )


def _windows(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(WINDOW, size - start)) for start in range(0, size, WINDOW))


def _mincore(fd: int, start: int, size: int) -> NDArray[np.uint8]:
    """For each page of these bytes of a file, 1 if it is in the page cache and 0 if not."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    pages = np.zeros(-(-size // PAGE), np.uint8)
    try:
        mapping = mmap.mmap(fd, size, access=mmap.ACCESS_READ, offset=start)
    except ValueError as error:  # the file is shorter than it was
        raise FormatError("it shrank while its pages were asked for") from error
    with mapping, memoryview(mapping) as view:
        address = np.frombuffer(view, np.uint8).ctypes.data
        if libc.mincore(address, size, pages.ctypes.data):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    pages &= 1  # macOS has more to say in the other bits
    return pages
