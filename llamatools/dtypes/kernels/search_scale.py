"""Float32 to Q4_0, Q5_0 and IQ4_NL, of least error weighted by the columns' importance: a scale per block is searched.

Sixteen blocks at a time, one per lane.
"""

from __future__ import annotations

from typing import Any

from .. import legacy, nonlinear
from ..base import Floats
from ..simd import (
    F32x16,
    I32x16,
    clamp,
    convert,
    inlined,
    kernel,
    load,
    lookup,
    rint,
    scratch,
    store_half,
)
from . import Bytes
from .layouts import offsets
from .legacy_encode import store_five_bits, store_nibbles
from .nonlinear_decode import IQ4_VALUES
from .nonlinear_encode import nearest_iq4
from .search_fit import as_half, load_group, reciprocal, search_scale

Q4_0, Q5_0, IQ4_NL = offsets(legacy.Q4_0), offsets(legacy.Q5_0), offsets(nonlinear.IQ4_NL)


@kernel
def search_q4_0(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * (q - 8)"""
    x, w = scratch(F32x16, 32), scratch(F32x16, 32)
    n_blocks = blocks.size // Q4_0.nbytes
    for group in range(0, n_blocks, 16):
        load_group(values, importance, group, n_blocks, 32, x, w)
        d = as_half(search_scale(x, w, 0, 32, nearest_of_4_bits, -8, 7, 0.55, 16))
        inverses = reciprocal(d)
        for lane in range(min(16, n_blocks - group)):
            block = (group + lane) * Q4_0.nbytes
            store_half(blocks, block + Q4_0.d, d[lane])
            low, high = _codes(values, 32 * (group + lane), inverses[lane], 8)
            store_nibbles(blocks, block + Q4_0.qs, low, high)


@kernel
def search_q5_0(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * (q - 16)"""
    x, w = scratch(F32x16, 32), scratch(F32x16, 32)
    n_blocks = blocks.size // Q5_0.nbytes
    for group in range(0, n_blocks, 16):
        load_group(values, importance, group, n_blocks, 32, x, w)
        d = as_half(search_scale(x, w, 0, 32, nearest_of_5_bits, -16, 15, 0.55, 16))
        inverses = reciprocal(d)
        for lane in range(min(16, n_blocks - group)):
            block = (group + lane) * Q5_0.nbytes
            store_half(blocks, block + Q5_0.d, d[lane])
            low, high = _codes(values, 32 * (group + lane), inverses[lane], 16)
            store_five_bits(blocks, block + Q5_0.qs, block + Q5_0.qh, low, high)


@kernel
def search_iq4_nl(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * IQ4_VALUES[q]"""
    x, w = scratch(F32x16, 32), scratch(F32x16, 32)
    n_blocks = blocks.size // IQ4_NL.nbytes
    for group in range(0, n_blocks, 16):
        load_group(values, importance, group, n_blocks, 32, x, w)
        d = as_half(search_scale(x, w, 0, 32, nearest_iq4_value, -127, 113, 0.55, 16))
        inverses = reciprocal(d)
        for lane in range(min(16, n_blocks - group)):
            block, start = (group + lane) * IQ4_NL.nbytes, 32 * (group + lane)
            store_half(blocks, block + IQ4_NL.d, d[lane])
            low = nearest_iq4(inverses[lane] * load(F32x16, values, start))
            high = nearest_iq4(inverses[lane] * load(F32x16, values, start + 16))
            store_nibbles(blocks, block + IQ4_NL.qs, low, high)


@inlined
def nearest_of_4_bits(x: Any) -> Any:
    return clamp(rint(x), -8, 7)


@inlined
def nearest_of_5_bits(x: Any) -> Any:
    return clamp(rint(x), -16, 15)


@inlined
def nearest_iq4_value(x: Any) -> Any:
    return lookup(IQ4_VALUES, nearest_iq4(x))


@inlined
def _codes(values: Floats, start: int, inverse: Any, zero: int) -> tuple[Any, Any]:
    """The codes of the 32 weights at start, counted from 0."""
    low = clamp(rint(load(F32x16, values, start) * inverse), -zero, zero - 1)
    high = clamp(rint(load(F32x16, values, start + 16) * inverse), -zero, zero - 1)
    return convert(I32x16, low) + zero, convert(I32x16, high) + zero
