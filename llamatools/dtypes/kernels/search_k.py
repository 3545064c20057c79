"""Float32 to Q4_K and Q5_K, of least error weighted by the columns' importance.

Sixteen blocks at a time, one per lane. Each sub-block's scale and minimum are searched on their own. Then, ROUNDS
times, each sub-block chooses among neighbouring codes of its scale, knowing what d and dmin the block has, and d and
dmin are made anew from all codes, by least squares.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..base import Floats
from ..simd import F32x16, I32x16, clamp, convert, inlined, kernel, maximum, rint, scratch, select, splat
from . import Bytes
from .k_encode import Q4_K, Q5_K, Fits, store_q4_k, store_q5_k
from .search_fit import TINY, as_half, load_group, reciprocal, search_scale_and_least

f32 = np.float32
LIMIT = 63  # of the codes of scales and minima
ROUNDS = 2


@kernel
def search_q4_k(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * scale * q - dmin * minimum, q in 0 .. 15"""
    scales, minima, inverses, origins = scratch(F32x16, 8), scratch(F32x16, 8), scratch(F32x16, 8), scratch(F32x16, 8)
    fits = Fits(scales, minima, inverses, origins, scratch(I32x16, 8), scratch(I32x16, 8))
    n_blocks = blocks.size // Q4_K.nbytes
    for group in range(0, n_blocks, 16):
        d, dmin = _search(values, importance, group, n_blocks, fits, 15)
        for lane in range(min(16, n_blocks - group)):
            store_q4_k(values, group + lane, d[lane], dmin[lane], fits, lane, blocks)


@kernel
def search_q5_k(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * scale * q - dmin * minimum, q in 0 .. 31"""
    scales, minima, inverses, origins = scratch(F32x16, 8), scratch(F32x16, 8), scratch(F32x16, 8), scratch(F32x16, 8)
    fits = Fits(scales, minima, inverses, origins, scratch(I32x16, 8), scratch(I32x16, 8))
    n_blocks = blocks.size // Q5_K.nbytes
    for group in range(0, n_blocks, 16):
        d, dmin = _search(values, importance, group, n_blocks, fits, 31)
        for lane in range(min(16, n_blocks - group)):
            store_q5_k(values, group + lane, d[lane], dmin[lane], fits, lane, blocks)


@inlined
def _search(values: Floats, importance: Floats, group: int, n_blocks: int, fits: Fits, limit: int) -> tuple[Any, Any]:
    """Fits blocks group to group + 15; past the end, the last block again. Fills `fits`, returns d and dmin."""
    x, w = scratch(F32x16, 256), scratch(F32x16, 256)
    load_group(values, importance, group, n_blocks, 256, x, w)
    for j in range(8):
        scale, least = search_scale_and_least(x, w, 32 * j, 32, limit, 0, -1.0, 0.25, 20)
        fits.scales[j], fits.minima[j] = scale, -least
        fits.inverses[j], fits.origins[j] = splat(F32x16, 0), splat(F32x16, 0)  # a scale of 0 has codes 0
    scale_codes, minimum_codes = scratch(F32x16, 8), scratch(F32x16, 8)
    d = _code_by_largest(fits.scales, scale_codes)
    dmin = _code_by_largest(fits.minima, minimum_codes)
    for _ in range(ROUNDS):
        error = splat(F32x16, 0)
        for j in range(8):
            scale_codes[j], minimum_codes[j], least_error = _choose(
                x, w, j, limit, d, dmin, scale_codes[j], minimum_codes[j]
            )
            error = error + least_error
        new_d, new_dmin = _refit(x, w, limit, d, dmin, scale_codes, minimum_codes)
        new_error = splat(F32x16, 0)
        for j in range(8):
            new_error = new_error + _error(x, w, j, limit, new_d * scale_codes[j], new_dmin * minimum_codes[j])
        d, dmin = select(new_error < error, new_d, d), select(new_error < error, new_dmin, dmin)
    for j in range(8):
        fits.scale_codes[j] = convert(I32x16, scale_codes[j])
        fits.minimum_codes[j] = convert(I32x16, minimum_codes[j])
    return d, dmin


@inlined
def _code_by_largest(numbers: Any, codes: Any) -> Any:
    """Codes 0 .. 63 for eight numbers per lane, none below 0, the largest being 63. Returns their unit, a float16."""
    largest = splat(F32x16, 0)
    for j in range(8):
        largest = maximum(largest, numbers[j])
    unit = as_half(largest / f32(LIMIT))
    inverse = reciprocal(unit)
    for j in range(8):
        codes[j] = clamp(rint(inverse * numbers[j]), 0, LIMIT)
    return unit


@inlined
def _choose(
    x: Any, w: Any, j: int, limit: int, d: Any, dmin: Any, scale_code: Any, minimum_code: Any
) -> tuple[Any, Any, Any]:
    """The codes of scale and minimum of least error for sub-block j, and that error.

    Tries scale codes up to 2 away, with the minimum that is best for the codes which that scale makes.
    """
    error = _error(x, w, j, limit, d * scale_code, dmin * minimum_code)
    best_scale, best_minimum = scale_code, minimum_code
    one_over_dmin = reciprocal(dmin)
    for step in range(-2, 3):
        tried = clamp(scale_code + f32(step), 0, LIMIT)
        scale = d * tried
        inverse, offset = reciprocal(scale), dmin * minimum_code
        excess, sum_w = splat(F32x16, 0), splat(F32x16, 0)
        for k in range(32 * j, 32 * j + 32):
            q = clamp(rint((x[k] + offset) * inverse), 0, limit)
            excess = excess + w[k] * (scale * q - x[k])
            sum_w = sum_w + w[k]
        best = clamp(rint(excess / sum_w * one_over_dmin), 0, LIMIT)
        new_error = _error(x, w, j, limit, scale, dmin * best)
        better = new_error < error
        best_scale, best_minimum = select(better, tried, best_scale), select(better, best, best_minimum)
        error = select(better, new_error, error)
    return best_scale, best_minimum, error


@inlined
def _refit(x: Any, w: Any, limit: int, d: Any, dmin: Any, scale_codes: Any, minimum_codes: Any) -> tuple[Any, Any]:
    """The d and dmin of least error for the codes as they are: x ~ d * s - dmin * m, where s = scale code * q."""
    wss, wsm, wmm = splat(F32x16, 0), splat(F32x16, 0), splat(F32x16, 0)
    wsx, wmx = splat(F32x16, 0), splat(F32x16, 0)
    for j in range(8):
        scale_code, m = scale_codes[j], minimum_codes[j]
        inverse, offset = reciprocal(d * scale_code), dmin * m
        for k in range(32 * j, 32 * j + 32):
            s = scale_code * clamp(rint((x[k] + offset) * inverse), 0, limit)
            ws, wm = w[k] * s, w[k] * m
            wss, wsm, wmm = wss + ws * s, wsm + ws * m, wmm + wm * m
            wsx, wmx = wsx + ws * x[k], wmx + wm * x[k]
    determinant = wss * wmm - wsm * wsm
    independent = determinant > f32(1e-5) * wss * wmm
    one_over = 1 / select(independent, determinant, 1)
    new_d = (wsx * wmm - wsm * wmx) * one_over
    new_dmin = (wsm * wsx - wss * wmx) * one_over
    new_d = select(independent, new_d, (wsx + dmin * wsm) / maximum(wss, TINY))
    new_dmin = select(independent, new_dmin, dmin)
    sound = (new_d >= 0) & (new_dmin >= 0)
    return as_half(select(sound, new_d, d)), as_half(select(sound, new_dmin, dmin))


@inlined
def _error(x: Any, w: Any, j: int, limit: int, scale: Any, offset: Any) -> Any:
    """sum w * (scale * q - offset - x)^2 over sub-block j, for the nearest codes q."""
    inverse = reciprocal(scale)
    error = splat(F32x16, 0)
    for k in range(32 * j, 32 * j + 32):
        difference = scale * clamp(rint((x[k] + offset) * inverse), 0, limit) - offset - x[k]
        error = error + w[k] * difference * difference
    return error
