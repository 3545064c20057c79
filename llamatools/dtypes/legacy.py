"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 weights with one float16 scale d, and perhaps a minimum m.

Layouts are ggml's (ggml-common.h). Nibbles are split: byte k of qs holds weight k in its low half and weight k + 16 in
its high half. Bit i of qh, little-endian, is the fifth bit of weight i.
"""

from __future__ import annotations

import numpy as np

from .base import DType

F16, U8 = "<f2", "u1"

Q4_0 = DType("Q4_0", 2, np.dtype([("d", F16), ("qs", U8, 16)]), 32)  # d * (q - 8)
Q4_1 = DType("Q4_1", 3, np.dtype([("d", F16), ("m", F16), ("qs", U8, 16)]), 32)  # d * q + m
Q5_0 = DType("Q5_0", 6, np.dtype([("d", F16), ("qh", U8, 4), ("qs", U8, 16)]), 32)  # d * (q - 16)
Q5_1 = DType("Q5_1", 7, np.dtype([("d", F16), ("m", F16), ("qh", U8, 4), ("qs", U8, 16)]), 32)  # d * q + m
Q8_0 = DType("Q8_0", 8, np.dtype([("d", F16), ("qs", "i1", 32)]), 32)  # d * q

TABLE = (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0)
