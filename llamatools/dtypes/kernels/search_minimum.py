"""Float32 to Q4_1 and Q5_1, of least error weighted by the columns' importance: a scale and a minimum are searched.

Sixteen blocks at a time, one per lane.
"""

from __future__ import annotations

from typing import Any

from .. import legacy
from ..base import Floats
from ..simd import F32x16, I32x16, clamp, convert, inlined, kernel, load, rint, scratch, store_half
from . import Bytes
from .layouts import offsets
from .legacy_encode import store_five_bits, store_nibbles
from .search_fit import as_half, load_group, reciprocal, search_scale_and_least

Q4_1, Q5_1 = offsets(legacy.Q4_1), offsets(legacy.Q5_1)


@kernel
def search_q4_1(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * q + m, q in 0 .. 15"""
    x, w = scratch(F32x16, 32), scratch(F32x16, 32)
    n_blocks = blocks.size // Q4_1.nbytes
    for group in range(0, n_blocks, 16):
        load_group(values, importance, group, n_blocks, 32, x, w)
        scale, least = search_scale_and_least(x, w, 0, 32, 15, 1e9, -1.0, 0.25, 24)
        d, m = as_half(scale), as_half(least)
        inverses = reciprocal(d)
        for lane in range(min(16, n_blocks - group)):
            block = (group + lane) * Q4_1.nbytes
            store_half(blocks, block + Q4_1.d, d[lane])
            store_half(blocks, block + Q4_1.m, m[lane])
            low, high = _codes(values, 32 * (group + lane), inverses[lane], m[lane], 15)
            store_nibbles(blocks, block + Q4_1.qs, low, high)


@kernel
def search_q5_1(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * q + m, q in 0 .. 31"""
    x, w = scratch(F32x16, 32), scratch(F32x16, 32)
    n_blocks = blocks.size // Q5_1.nbytes
    for group in range(0, n_blocks, 16):
        load_group(values, importance, group, n_blocks, 32, x, w)
        scale, least = search_scale_and_least(x, w, 0, 32, 31, 1e9, -1.0, 0.25, 24)
        d, m = as_half(scale), as_half(least)
        inverses = reciprocal(d)
        for lane in range(min(16, n_blocks - group)):
            block = (group + lane) * Q5_1.nbytes
            store_half(blocks, block + Q5_1.d, d[lane])
            store_half(blocks, block + Q5_1.m, m[lane])
            low, high = _codes(values, 32 * (group + lane), inverses[lane], m[lane], 31)
            store_five_bits(blocks, block + Q5_1.qs, block + Q5_1.qh, low, high)


@inlined
def _codes(values: Floats, start: int, inverse: Any, least: Any, limit: int) -> tuple[Any, Any]:
    """The codes of the 32 weights at start."""
    low = clamp(rint((load(F32x16, values, start) - least) * inverse), 0, limit)
    high = clamp(rint((load(F32x16, values, start + 16) - least) * inverse), 0, limit)
    return convert(I32x16, low), convert(I32x16, high)
