"""Float32 to Q6_K and IQ4_XS, of least error weighted by the columns' importance.

Sixteen blocks at a time, one per lane. Each sub-block's scale is searched on its own. Then each sub-block
chooses among neighbouring codes of its scale, knowing what d the block has, and d is made anew from all codes, by least
squares.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..base import Floats
from ..simd import (
    F32x16,
    I8x16,
    clamp,
    convert,
    inlined,
    kernel,
    load,
    maximum,
    minimum,
    rint,
    scratch,
    select,
    splat,
    store_half,
)
from . import Bytes
from .nonlinear_encode import IQ4_XS, store_iq4_xs
from .q6_k_encode import Q6_K, store_codes
from .search_fit import TINY, as_half, load_group, reciprocal, scale_products, search_scale
from .search_scale import nearest_iq4_value

f32 = np.float32


@kernel
def search_q6_k(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * scale * (q - 32), scale in -128 .. 127"""
    x, w, codes = scratch(F32x16, 256), scratch(F32x16, 256), scratch(F32x16, 16)
    n_blocks = blocks.size // Q6_K.nbytes
    for group in range(0, n_blocks, 16):
        load_group(values, importance, group, n_blocks, 256, x, w)
        for j in range(16):
            codes[j] = search_scale(x, w, 16 * j, 16, nearest_of_6_bits, -32, 31, 0.75, 8)
        d = _choose_together(x, w, 16, nearest_of_6_bits, -128, codes, 1)
        for lane in range(min(16, n_blocks - group)):
            block = (group + lane) * Q6_K.nbytes
            store_half(blocks, block + Q6_K.d, d[lane])
            for j in range(16):
                blocks[block + Q6_K.scales + j] = int(codes[j][lane]) & 255
            scales = d[lane] * convert(F32x16, load(I8x16, blocks, block + Q6_K.scales))
            store_codes(values, group + lane, scales, splat(F32x16, 0), scales == scales, blocks)


@kernel
def search_iq4_xs(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * (scale - 32) * IQ4_VALUES[q], scale in 0 .. 63"""
    x, w, codes = scratch(F32x16, 256), scratch(F32x16, 256), scratch(F32x16, 8)
    n_blocks = blocks.size // IQ4_XS.nbytes
    for group in range(0, n_blocks, 16):
        load_group(values, importance, group, n_blocks, 256, x, w)
        for j in range(8):
            codes[j] = search_scale(x, w, 32 * j, 32, nearest_iq4_value, -127, 113, 0.55, 12)
        d = _choose_together(x, w, 32, nearest_iq4_value, -32, codes, 2)
        store_iq4_xs(values, group, d, codes, blocks)


@inlined
def nearest_of_6_bits(x: Any) -> Any:
    return clamp(rint(x), -32, 31)


@inlined
def _choose_together(x: Any, w: Any, n: int, nearest: Any, lowest: int, scales: Any, n_rounds: int) -> Any:
    """Makes scales, of sub-blocks of n weights, whole numbers from `lowest` to -lowest - 1. Returns their unit."""
    largest = splat(F32x16, 0)
    for j in range(256 // n):
        largest = select(abs(scales[j]) > abs(largest), scales[j], largest)
    d = as_half(largest / f32(lowest))
    inverse = reciprocal(d)
    for j in range(256 // n):
        scales[j] = clamp(rint(inverse * scales[j]), lowest, -lowest - 1)
    for _ in range(n_rounds):
        error, wvx, wvv = splat(F32x16, 0), splat(F32x16, 0), splat(F32x16, 0)
        for j in range(256 // n):
            code, least_error = scales[j], splat(F32x16, f32(np.inf))
            for step in range(-1, 2):
                tried = clamp(scales[j] + f32(step), lowest, -lowest - 1)
                new_error = _error(x, w, n * j, n, nearest, d * tried)
                code = select(new_error < least_error, tried, code)
                least_error = minimum(new_error, least_error)
            scales[j] = code
            error = error + least_error
            products = scale_products(x, w, n * j, n, nearest, reciprocal(d * code))
            wvx = wvx + code * products[0]
            wvv = wvv + code * code * products[1]
        new_d = as_half(wvx / maximum(wvv, TINY))
        new_error = splat(F32x16, 0)
        for j in range(256 // n):
            new_error = new_error + _error(x, w, n * j, n, nearest, new_d * scales[j])
        d = select(new_error < error, new_d, d)
    return d


@inlined
def _error(x: Any, w: Any, first: int, n: int, nearest: Any, scale: Any) -> Any:
    """sum w * (scale * v - x)^2 for the values v = nearest(x / scale)."""
    inverse = reciprocal(scale)
    error = splat(F32x16, 0)
    for k in range(first, first + n):
        difference = scale * nearest(inverse * x[k]) - x[k]
        error = error + w[k] * difference * difference
    return error
