"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 weights with one float16 scale d, and perhaps a minimum m.

Layouts are ggml's (ggml-common.h). Nibbles are split: byte k of qs holds weight k in its low half and weight k + 16 in
its high half. Bit i of qh, little-endian, is the fifth bit of weight i.
"""

from __future__ import annotations

import numpy as np

from .base import DType
from .kernels import comparer, decoder, encoder, searcher

F16, U8 = "<f2", "u1"


def _dtype(name: str, id_: int, *fields: tuple[str, str] | tuple[str, str, int], search: str | None = None) -> DType:
    block, kind = np.dtype(list(fields)), name.lower()
    weighted_kernel = f"legacy_weighted.encode_{kind}_weighted" if search else None
    decode = decoder(f"legacy_decode.decode_{kind}", 32)
    encode = encoder(f"legacy_encode.encode_{kind}", weighted_kernel, block, 32)
    find = searcher(f"{search}.search_{kind}", block, 32) if search else None
    return DType(name, id_, block, 32, decode, encode, find, comparer(f"legacy_decode.compare_{kind}"))


Q4_0 = _dtype("Q4_0", 2, ("d", F16), ("qs", U8, 16), search="search_scale")  # d * (q - 8)
Q4_1 = _dtype("Q4_1", 3, ("d", F16), ("m", F16), ("qs", U8, 16), search="search_minimum")  # d * q + m
Q5_0 = _dtype("Q5_0", 6, ("d", F16), ("qh", U8, 4), ("qs", U8, 16), search="search_scale")  # d * (q - 16)
Q5_1 = _dtype("Q5_1", 7, ("d", F16), ("m", F16), ("qh", U8, 4), ("qs", U8, 16), search="search_minimum")  # d * q + m
Q8_0 = _dtype("Q8_0", 8, ("d", F16), ("qs", "i1", 32))  # d * q

TABLE = (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0)
