"""IQ4_NL, IQ4_XS, MXFP4: four-bit codes that look a value up in a table of 16, unevenly spaced.

Layouts and tables are ggml's (ggml-common.h); nibbles are split within each 32 weights, as in legacy.py.
"""

from __future__ import annotations

import numpy as np

from .base import DType
from .kernels import comparer, decoder, encoder, searcher

F16, U8 = "<f2", "u1"

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice E2M1's; the fourth bit is the sign


def _dtype(
    name: str, id_: int, block_size: int, *fields: tuple[str, str] | tuple[str, str, int], weighted: bool = True
) -> DType:
    block, kind = np.dtype(list(fields)), name.lower()
    kernel = f"nonlinear_encode.encode_{kind}"
    decode = decoder(f"nonlinear_decode.decode_{kind}", block_size)
    encode = encoder(kernel, f"{kernel}_weighted" if weighted else None, block, block_size)
    searches = "search_scale" if block_size == 32 else "search_scales"
    find = searcher(f"{searches}.search_{kind}", block, block_size) if weighted else None
    compare = comparer(f"nonlinear_decode.compare_{kind}")
    return DType(name, id_, block, block_size, decode, encode, find, compare)


IQ4_NL = _dtype("IQ4_NL", 20, 32, ("d", F16), ("qs", U8, 16))  # d * IQ4_VALUES[q]
# d * (scale - 32) * IQ4_VALUES[q], per sub-block of 32; scales have four bits in scales_l, two more in scales_h
IQ4_XS = _dtype("IQ4_XS", 23, 256, ("d", F16), ("scales_h", "<u2"), ("scales_l", U8, 4), ("qs", U8, 128))
MXFP4 = _dtype("MXFP4", 39, 32, ("e", U8), ("qs", U8, 16), weighted=False)  # 2^(e - 128) * MXFP4_VALUES[q]

TABLE = (IQ4_NL, IQ4_XS, MXFP4)
