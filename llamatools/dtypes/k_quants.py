"""Q2_K to Q6_K: super-blocks of 256 weights, in sub-blocks of 16 or 32 that have small integer scales (and minima) of
their own, in units of the super-block's d (and dmin).

Layouts are ggml's (ggml-common.h).
"""

from __future__ import annotations

import numpy as np

from .base import DType

F16, U8 = "<f2", "u1"

Q2_K = DType("Q2_K", 10, np.dtype([("scales", U8, 16), ("qs", U8, 64), ("d", F16), ("dmin", F16)]), 256)
Q3_K = DType("Q3_K", 11, np.dtype([("hmask", U8, 32), ("qs", U8, 64), ("scales", U8, 12), ("d", F16)]), 256)
Q4_K = DType("Q4_K", 12, np.dtype([("d", F16), ("dmin", F16), ("scales", U8, 12), ("qs", U8, 128)]), 256)
Q5_K = DType(
    "Q5_K", 13, np.dtype([("d", F16), ("dmin", F16), ("scales", U8, 12), ("qh", U8, 32), ("qs", U8, 128)]), 256
)
Q6_K = DType("Q6_K", 14, np.dtype([("ql", U8, 128), ("qh", U8, 64), ("scales", "i1", 16), ("d", F16)]), 256)

TABLE = (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
