"""How much of the weights is lost where they are stored in blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .base import Blocks, DType, Weights

# Weights up to here fit every block type: their scales and minima are float16, and none exceeds the largest weight.
SAFE_SQUARE = 65504.0**2


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

    def add(self, weights: Weights, blocks: Blocks, dtype: DType, start: int) -> float:
        """Takes in `weights` (rows, weights per row), the first of them row `start`, and the blocks made of them.

        Returns the sum of squares of `weights`, as `sum_of_squares` does.
        """
        assert dtype.compare is not None, "only what can be encoded is compared"
        squares, errors, worst, where = map(float, dtype.compare(weights, blocks))
        self.block_size = dtype.block_size
        self.n_weights += weights.size
        self.squares += squares
        self.errors += errors
        if worst > self.worst:
            row, column = divmod(int(where), weights.shape[1])
            self.worst, self.worst_at = worst, (start + row, column)
        return squares

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
