"""Blocks of ggml before 19 May 2023, under type numbers that mean other blocks today: known by layout, not converted.

Only files in the formats ggml, ggmf and ggjt hold them, and which of them follows from the format's version. Until
ggjt v1 byte k of qs holds weights 2k and 2k + 1; from v2 on weights k and k + 16, as today. The scales of Q4_0, Q4_1
and Q8_0 were float32 until ggjt v2. The unversioned format is a case of its own: see formats/ggml.py.
Source: llama.cpp's history, commits b9fd7eee5 (v2), 2d5db4837 (v3) and 36d19a603 (the end of Q4_2 and Q4_3).
"""

from __future__ import annotations

import numpy as np

from .base import DType

F16, F32, U8 = "<f2", "<f4", "u1"


def _dtype(name: str, block_size: int, *fields: tuple[str, str] | tuple[str, str, int]) -> DType:
    return DType(name, None, np.dtype(list(fields)), block_size)


def _nibbles(era: str) -> dict[int, DType]:
    """Q4_0 and Q4_1 with float32 scales."""
    return {
        2: _dtype(f"Q4_0 ({era})", 32, ("d", F32), ("qs", U8, 16)),
        3: _dtype(f"Q4_1 ({era})", 32, ("d", F32), ("m", F32), ("qs", U8, 16)),
    }


Q8_0_F32 = _dtype("Q8_0 (ggjt v1, v2)", 32, ("d", F32), ("qs", "i1", 32))

# By ggml's number of the type.
UNVERSIONED = _nibbles("ggml")
GGJT_V1 = _nibbles("ggjt v1") | {
    4: _dtype("Q4_2", 16, ("d", F16), ("qs", U8, 8)),
    5: _dtype("Q4_3", 16, ("d", F16), ("m", F16), ("qs", U8, 8)),
    6: _dtype("Q5_0 (ggjt v1)", 32, ("d", F16), ("qh", U8, 4), ("qs", U8, 16)),
    7: _dtype("Q5_1 (ggjt v1)", 32, ("d", F16), ("m", F16), ("qh", U8, 4), ("qs", U8, 16)),
    8: Q8_0_F32,
}
GGJT_V2 = _nibbles("ggjt v2") | {8: Q8_0_F32}

# Bytes of a super-block of 64 weights, where all of today's hold 256. llama.cpp wrote them under the same numbers where
# it was built with LLAMA_QKK_64, from June 2023 (6769e944c) to March 2024.
SUPER_BLOCKS_OF_64 = {"Q2_K": 24, "Q3_K": 28, "Q4_K": 38, "Q5_K": 46, "Q6_K": 54}
OF_64 = "its blocks are of 64 weights, as llama.cpp built with LLAMA_QKK_64 wrote them until 2024, where 256 are read"


def nbytes_by_64(dtype: DType, n_weights: int) -> int | None:
    """Bytes that weights of a K type take in super-blocks of 64; None for other types."""
    nbytes = SUPER_BLOCKS_OF_64.get(dtype.name)
    return None if nbytes is None else n_weights // 64 * nbytes
