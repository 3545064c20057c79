"""How much of the weights is lost where they are stored in blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .base import DType, Floats
from .kernels import kernel_function, read_only

# Weights up to here fit every block type: their scales and minima are float16, and none exceeds the largest weight.
SAFE_SQUARE = 65504.0**2


def sum_of_squares(values: Floats) -> float:
    """Of all weights. Above SAFE_SQUARE, or NaN, where one is no number or so large that a block may not hold it."""
    sums = np.empty(1)
    kernel_function("rounding.squares")(read_only(values).reshape(-1), sums)
    return float(sums[0])


@dataclass
class Rounding:
    """How far decoded blocks are from the weights they encode; sums over all that was added.

    squares, errors: sums of squares of weights, and of differences. worst: of the block with the largest error, the
    sum of squares of its differences, and in worst_at its row and first column.
    """

    block_size: int = 0
    n_weights: int = 0
    squares: float = 0.0
    errors: float = 0.0
    worst: float = -1.0
    worst_at: tuple[int, int] = (0, 0)

    def add(self, values: Floats, decoded: Floats, dtype: DType, start: int) -> float:
        """Takes in `values` (rows, weights per row), the first of them row `start`, and what blocks made of them.

        Returns the sum of squares of `values`, as `sum_of_squares` does.
        """
        sums = np.empty(4)
        flat, other = read_only(values).reshape(-1), read_only(decoded).reshape(-1)
        kernel_function("rounding.compare")(flat, other, dtype.block_size, sums)
        self.block_size = dtype.block_size
        self.n_weights += values.size
        self.squares += sums[0]
        self.errors += sums[1]
        if sums[2] > self.worst:
            row, column = divmod(int(sums[3]), values.shape[1])
            self.worst, self.worst_at = float(sums[2]), (start + row, column)
        return float(sums[0])

    @property
    def relative_rmse(self) -> float:
        """The root mean square of the differences over that of the weights; 0 where all weights are 0."""
        return math.sqrt(self.errors / self.squares) if self.squares else 0.0

    @property
    def worst_block(self) -> float:
        """The same for the worst block's differences, over that of all the tensor's weights."""
        if not self.squares:
            return 0.0
        return math.sqrt(self.worst / self.block_size / (self.squares / self.n_weights))
