"""What a dtype is: a named, numbered block layout and the two functions between blocks and float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[Any]  # (n_rows, blocks per row) of a DType's block
Floats = NDArray[np.float32]  # (n_rows, weights per row)
Weights = NDArray[Any]  # Floats, or bfloat16 as uint16 (n_rows, weights per row), which quantizing reads as it is

Decode = Callable[[Blocks], Floats]
Encode = Callable[[Weights, Floats | None], Blocks]
Compare = Callable[[Weights, Blocks], NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class DType:
    """A row of the dtype table.

    name: as ggml spells it ("F32", "Q4_K"); dtypes that GGUF lacks carry safetensors' name ("U8", "BOOL").
    id: ggml's type number, None where GGUF has none.
    block: numpy layout of one block, little-endian; a plain scalar where block_size is 1.
    block_size: weights per block; a row's length must be a multiple of it.
    decode: blocks (n_rows, blocks per row) -> float32 (n_rows, weights per row); None where not supported.
    encode: weights (n_rows, weights per row), and the importance of each column (weights per row,) or None,
        -> blocks (n_rows, blocks per row); None where not supported. Quantized dtypes take bfloat16, too.
    search: as encode, looking further for codes and scales of less weighted error; None where there is no search, or
        where encode leaves nothing to look for.
    compare: weights, and the blocks made of them -> the sums of squares of the weights, of the differences, and of
        those of the worst block; and where that block begins among the weights. None where nothing is encoded.
    """

    name: str
    id: int | None
    block: np.dtype[Any]
    block_size: int = 1
    decode: Decode | None = None
    encode: Encode | None = None
    search: Encode | None = None
    compare: Compare | None = None

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<DType {self.name}>"

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block."""
        return self.block.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight takes, its share of the block's scales included."""
        return 8 * self.block_nbytes / self.block_size

    @property
    def is_quantized(self) -> bool:
        """True where several weights share a block."""
        return self.block_size > 1

    def row_nbytes(self, n_weights: int) -> int:
        """Bytes of a row of `n_weights`, which must be a multiple of block_size (else ValueError)."""
        if n_weights % self.block_size:
            raise ValueError(f"{n_weights} weights do not divide into {self.name} blocks of {self.block_size}")
        return n_weights // self.block_size * self.block_nbytes
