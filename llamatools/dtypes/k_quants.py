"""Q2_K to Q6_K: super-blocks of 256 weights, in sub-blocks of 16 or 32 that have small integer scales (and minima) of
their own, in units of the super-block's d (and dmin).

Layouts are ggml's (ggml-common.h).
"""

from __future__ import annotations

import numpy as np

from .base import DType
from .kernels import comparer, decoder, encoder, searcher

F16, U8 = "<f2", "u1"
SEARCHES = {"Q4_K": "search_k", "Q5_K": "search_k", "Q6_K": "search_scales"}


def _dtype(name: str, id_: int, encoder_module: str | None, *fields: tuple[str, str] | tuple[str, str, int]) -> DType:
    block, kind = np.dtype(list(fields)), name.lower()
    decode = decoder(f"k_decode.decode_{kind}", 256)
    encode = find = compare = None
    if encoder_module:
        kernel = f"{encoder_module}.encode_{kind}"
        encode = encoder(kernel, f"{kernel}_weighted", block, 256)
        find = searcher(f"{SEARCHES[name]}.search_{kind}", block, 256)
        compare = comparer(f"k_decode.compare_{kind}")
    return DType(name, id_, block, 256, decode, encode, find, compare)


Q2_K = _dtype("Q2_K", 10, None, ("scales", U8, 16), ("qs", U8, 64), ("d", F16), ("dmin", F16))
Q3_K = _dtype("Q3_K", 11, None, ("hmask", U8, 32), ("qs", U8, 64), ("scales", U8, 12), ("d", F16))
Q4_K = _dtype("Q4_K", 12, "k_encode", ("d", F16), ("dmin", F16), ("scales", U8, 12), ("qs", U8, 128))
Q5_K = _dtype("Q5_K", 13, "k_encode", ("d", F16), ("dmin", F16), ("scales", U8, 12), ("qh", U8, 32), ("qs", U8, 128))
Q6_K = _dtype("Q6_K", 14, "q6_k_encode", ("ql", U8, 128), ("qh", U8, 64), ("scales", "i1", 16), ("d", F16))

TABLE = (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
