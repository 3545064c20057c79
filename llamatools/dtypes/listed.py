"""Quantized types known by name, number and size only: `inspect` lists them, nothing converts them."""

from __future__ import annotations

import numpy as np

from .base import DType

TABLE = tuple(
    DType(name, id_, np.dtype((np.void, nbytes)), block_size)
    for name, id_, nbytes, block_size in (
        ("Q8_1", 9, 36, 32), ("Q8_K", 15, 292, 256), ("IQ2_XXS", 16, 66, 256), ("IQ2_XS", 17, 74, 256),
        ("IQ3_XXS", 18, 98, 256), ("IQ1_S", 19, 50, 256), ("IQ3_S", 21, 110, 256), ("IQ2_S", 22, 82, 256),
        ("IQ1_M", 29, 56, 256), ("TQ1_0", 34, 54, 256), ("TQ2_0", 35, 66, 256), ("NVFP4", 40, 36, 64),
        ("Q1_0", 41, 18, 128), ("Q2_0", 42, 18, 64),
    )
)  # fmt: skip
