"""Block layouts of ggml's quantized types, as numpy structured dtypes.

Layouts are those of ggml-common.h (llama.cpp b11434). "split" nibbles: byte k holds weight k in its low half and
weight k + half the block (or sub-block) in its high half.
"""

from __future__ import annotations

import numpy as np

from .base import DType

F16, U8 = "<f2", "u1"


def _block(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype[np.void]:
    return np.dtype(list(fields))


def _opaque(nbytes: int) -> np.dtype[np.void]:
    return np.dtype((np.void, nbytes))


# Blocks of 32: a scale d, perhaps a minimum m, split nibbles, fifth bits in qh (bit i = weight i).
Q4_0 = DType("Q4_0", 2, _block(("d", F16), ("qs", U8, 16)), 32)  # d * (q - 8)
Q4_1 = DType("Q4_1", 3, _block(("d", F16), ("m", F16), ("qs", U8, 16)), 32)  # d * q + m
Q5_0 = DType("Q5_0", 6, _block(("d", F16), ("qh", U8, 4), ("qs", U8, 16)), 32)  # d * (q - 16)
Q5_1 = DType("Q5_1", 7, _block(("d", F16), ("m", F16), ("qh", U8, 4), ("qs", U8, 16)), 32)  # d * q + m
Q8_0 = DType("Q8_0", 8, _block(("d", F16), ("qs", "i1", 32)), 32)  # d * q

# Super-blocks of 256, with a scale (and minimum) per sub-block.
Q2_K = DType("Q2_K", 10, _block(("scales", U8, 16), ("qs", U8, 64), ("d", F16), ("dmin", F16)), 256)
Q3_K = DType("Q3_K", 11, _block(("hmask", U8, 32), ("qs", U8, 64), ("scales", U8, 12), ("d", F16)), 256)
Q4_K = DType("Q4_K", 12, _block(("d", F16), ("dmin", F16), ("scales", U8, 12), ("qs", U8, 128)), 256)
Q5_K = DType("Q5_K", 13, _block(("d", F16), ("dmin", F16), ("scales", U8, 12), ("qh", U8, 32), ("qs", U8, 128)), 256)
Q6_K = DType("Q6_K", 14, _block(("ql", U8, 128), ("qh", U8, 64), ("scales", "i1", 16), ("d", F16)), 256)

# Codes look a value up in a table of 16.
IQ4_NL = DType("IQ4_NL", 20, _block(("d", F16), ("qs", U8, 16)), 32)
IQ4_XS = DType("IQ4_XS", 23, _block(("d", F16), ("scales_h", "<u2"), ("scales_l", U8, 4), ("qs", U8, 128)), 256)
MXFP4 = DType("MXFP4", 39, _block(("e", U8), ("qs", U8, 16)), 32)

# Known by name and size only: listed, never converted.
LISTED = tuple(
    DType(name, id_, _opaque(nbytes), block_size)
    for name, id_, nbytes, block_size in (
        ("Q8_1", 9, 36, 32), ("Q8_K", 15, 292, 256), ("IQ2_XXS", 16, 66, 256), ("IQ2_XS", 17, 74, 256),
        ("IQ3_XXS", 18, 98, 256), ("IQ1_S", 19, 50, 256), ("IQ3_S", 21, 110, 256), ("IQ2_S", 22, 82, 256),
        ("IQ1_M", 29, 56, 256), ("TQ1_0", 34, 54, 256), ("TQ2_0", 35, 66, 256), ("NVFP4", 40, 36, 64),
        ("Q1_0", 41, 18, 128), ("Q2_0", 42, 18, 64),
    )
)  # fmt: skip

TABLE = (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4, *LISTED)
