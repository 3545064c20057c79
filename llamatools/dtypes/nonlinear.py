"""IQ4_NL, IQ4_XS, MXFP4: four-bit codes that look a value up in a table of 16, unevenly spaced.

Layouts are ggml's (ggml-common.h); nibbles are split within each 32 weights, as in legacy.py.
"""

from __future__ import annotations

import numpy as np

from .base import DType

F16, U8 = "<f2", "u1"

IQ4_NL = DType("IQ4_NL", 20, np.dtype([("d", F16), ("qs", U8, 16)]), 32)
IQ4_XS = DType("IQ4_XS", 23, np.dtype([("d", F16), ("scales_h", "<u2"), ("scales_l", U8, 4), ("qs", U8, 128)]), 256)
MXFP4 = DType("MXFP4", 39, np.dtype([("e", U8), ("qs", U8, 16)]), 32)

TABLE = (IQ4_NL, IQ4_XS, MXFP4)
