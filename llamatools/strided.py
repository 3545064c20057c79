"""Reading rows of a strided view: a transpose, a slice of columns, an axis repeated by stride 0.

The rows asked for are cut into boxes of indices, and each box, by halves, into boxes whose bytes lie close together;
such a box is fetched by one read, and its weights are picked from memory. So memory is bounded, and bytes are skipped
where skipping them costs less than reading them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

SPAN = 4 << 20  # bytes; one read fetches at most so many
GAP = 64 << 10  # bytes; reading on costs less than another read up to here
AHEAD = 8 << 20  # bytes of rows that are read at once and kept for the next request

Read = Callable[[memoryview, int], object]  # fills a buffer with the bytes from an offset on


class StridedRows:
    """The rows of a view of a file; safe for threads.

    Rows of a transpose lie side by side, so reading few at a time would fetch all of it for each few. Hence rows are
    read ahead, and kept until the last of them is asked for.

    offset: of the first weight, in bytes. shape, strides: the last axis is the rows'; strides in weights.
    """

    def __init__(
        self, read: Read, block: np.dtype[Any], offset: int, shape: Sequence[int], strides: Sequence[int]
    ) -> None:
        self._read, self._block, self._offset = read, block, offset
        self._grid, self._row_length = tuple(shape[:-1]), shape[-1]
        # In bytes. The stride of an axis of length 1 is never taken, and may be beyond what an index can hold.
        self._steps = tuple(stride * block.itemsize if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))
        self._kept: tuple[int, NDArray[Any]] = (0, np.empty((0, self._row_length), block))

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop, as (rows, row length)."""
        first, rows = self._kept
        if not first <= start <= stop <= first + len(rows):
            first = start
            n_ahead = AHEAD // max(self._row_length * self._block.itemsize, 1)
            rows = self._fetch(start, max(stop, min(start + n_ahead, prod(self._grid))))
        done = stop == first + len(rows)
        self._kept = (0, rows[:0].copy()) if done else (first, rows)
        return rows[start - first : stop - first].copy()

    def _fetch(self, start: int, stop: int) -> NDArray[Any]:
        rows = np.empty((stop - start, self._row_length), self._block)
        if rows.size:
            n_done = 0
            for first, sizes in _boxes(self._grid, start, stop):
                target = rows[n_done : n_done + prod(sizes)].reshape(*sizes, self._row_length)
                at = self._offset + sum(i * step for i, step in zip(first, self._steps, strict=False))
                self._fill(target, at, self._steps[len(self._steps) - target.ndim :])
                n_done += prod(sizes)
        return rows

    def _fill(self, target: NDArray[Any], at: int, steps: Sequence[int]) -> None:
        """Fills `target` with the weights from byte `at` on that lie `steps` bytes apart along its axes."""
        shape, itemsize = target.shape, self._block.itemsize
        reaches = [(n - 1) * step for n, step in zip(shape, steps, strict=True)]
        nbytes = sum(reaches) + itemsize
        widest = max(reaches)
        axis = reaches.index(widest)
        is_gapped = widest > 0 and steps[axis] - (nbytes - widest) > GAP
        if widest and (is_gapped or nbytes > SPAN):
            n_pieces = shape[axis] if is_gapped else 2
            whole = (slice(None),) * axis
            for piece in range(n_pieces):
                low, high = shape[axis] * piece // n_pieces, shape[axis] * (piece + 1) // n_pieces
                self._fill(target[(*whole, slice(low, high))], at + low * steps[axis], steps)
        else:
            span = np.empty(nbytes, np.uint8)
            self._read(span.data, at)
            first = span[:itemsize].view(self._block)
            target[...] = as_strided(first, shape, steps, writeable=False)


def _boxes(grid: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The flat indices start to stop of a grid, in order, as boxes: first index, and sizes along the last axes."""
    if not grid:
        yield (), ()
        return
    inner = prod(grid[1:])
    while start < stop:
        index, at = divmod(start, inner)
        n_whole = (stop - start) // inner
        if at == 0 and n_whole:
            yield (index, *(0 for _ in grid[1:])), (n_whole, *grid[1:])
            start += n_whole * inner
        else:
            end = min(at + stop - start, inner)
            for first, sizes in _boxes(grid[1:], at, end):
                yield (index, *first), sizes
            start += end - at
