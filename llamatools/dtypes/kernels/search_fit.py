"""Searches for the scale, or the scale and minimum, of least weighted error, wider than ggml's in fit.py.

Each lane fits a run of weights of its own. `x` and `w` are scratch of F32x16: x[k] holds the k-th weight of each lane's
run, w[k] how much its error counts. Magnitudes of x are at most MOST, w is from 0 to 1: no sum overflows.

A search tries many scales, each with the codes that it makes, for which the best scale is known: a division of two
sums. Codes and scale are then made from each other a few times more, which never makes the error larger.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..base import Floats
from ..simd import (
    LANE,
    F32x16,
    clamp,
    float_to_half,
    half_to_float,
    inlined,
    load_transposed,
    maximum,
    minimum,
    rint,
    select,
    splat,
)

f32 = np.float32
MOST = f32(2.0**30)  # beyond what any block type can hold
MOST_HALF = f32(65504)
MOST_SHARE = 1.15
TINY = f32(2.0**-60)  # stands for zero where something is divided by it
ROUNDS = 2  # of codes and scale from each other


@inlined
def load_group(values: Floats, importance: Floats, group: int, n_blocks: int, block_size: int, x: Any, w: Any) -> None:
    """Blocks group to group + 15 into x, their columns' importance into w; past the end, the last block again."""
    block = minimum(LANE + group, n_blocks - 1)
    blocks_per_row = importance.size // block_size
    column = block_size * (block - block // blocks_per_row * blocks_per_row)
    for first in range(0, block_size, 16):
        load_transposed(values, block_size * block, x, first)
        load_transposed(importance, column, w, first)
        for k in range(first, first + 16):
            x[k] = clamp(x[k], -MOST, MOST)


@inlined
def as_half(x: Any) -> Any:
    """Each lane as float16 can hold it, the greatest finite one at most."""
    return half_to_float(float_to_half(clamp(x, -MOST_HALF, MOST_HALF)))


@inlined
def reciprocal(x: Any) -> Any:
    """1 / x, and 0 where x is 0 or nearly so."""
    return select(abs(x) > TINY, 1 / select(abs(x) > TINY, x, 1), 0)


# ---- x ~ scale * q


@inlined
def search_scale(
    x: Any, w: Any, first: int, n: int, nearest: Any, low: float, high: float, least_share: float, n_steps: int
) -> Any:
    """The scale for runs of n weights from x[first] on, where nearest(x / scale) are values from low to high.

    Lets the weight of largest magnitude become `low`, and `high`, each times 1.15 down to least_share in n_steps: what
    lies beyond them then is cut off.
    """
    m = splat(F32x16, 0)
    for k in range(first, first + n):
        m = select(abs(x[k]) > abs(m), x[k], m)
    one_over_m = reciprocal(m)
    scale, gain = splat(F32x16, 0), splat(F32x16, 0)
    for step in range(2 * n_steps + ROUNDS):
        if step < 2 * n_steps:
            end = f32(low) if step < n_steps else f32(high)
            i = step if step < n_steps else step - n_steps
            inverse = (f32(MOST_SHARE) - f32(MOST_SHARE - least_share) * f32(i) / f32(n_steps - 1)) * end * one_over_m
        else:
            inverse = reciprocal(scale)
        wvx, wvv = scale_products(x, w, first, n, nearest, inverse)
        new_scale = wvx / maximum(wvv, TINY)
        new_gain = new_scale * wvx  # by how much the error is below that of all zeros
        scale, gain = select(new_gain > gain, new_scale, scale), maximum(new_gain, gain)
    return scale


@inlined
def scale_products(x: Any, w: Any, first: int, n: int, nearest: Any, inverse: Any) -> tuple[Any, Any]:
    """sum(w v x) and sum(w v v) for the values v = nearest(inverse * x)."""
    wvx, wvv = splat(F32x16, 0), splat(F32x16, 0)
    for k in range(first, first + n):
        v = nearest(inverse * x[k])
        wv = w[k] * v
        wvx = wvx + wv * x[k]
        wvv = wvv + wv * v
    return wvx, wvv


# ---- x ~ scale * q + least


@inlined
def search_scale_and_least(
    x: Any, w: Any, first: int, n: int, limit: int, highest: float, start: float, step: float, n_steps: int
) -> tuple[Any, Any]:
    """The scale and least, at most `highest`, for runs of n weights from x[first] on, where q is 0 .. limit.

    Lets the span from the least weight to the greatest have limit + start + i * step codes.
    """
    least, greatest = x[first], x[first]
    sum_w, sum_wx, sum_wxx = splat(F32x16, 0), splat(F32x16, 0), splat(F32x16, 0)
    for k in range(first, first + n):
        least = minimum(x[k], least)
        greatest = maximum(x[k], greatest)
        wx = w[k] * x[k]
        sum_w = sum_w + w[k]
        sum_wx = sum_wx + wx
        sum_wxx = sum_wxx + wx * x[k]
    least = minimum(least, highest)
    one_over_span = reciprocal(greatest - least)
    scale, error = splat(F32x16, 0), splat(F32x16, np.inf)
    sums = (sum_w, sum_wx, sum_wxx)
    for i in range(n_steps + ROUNDS):
        n_codes = f32(limit) + f32(start) + f32(step) * f32(i)
        inverse = n_codes * one_over_span if i < n_steps else reciprocal(scale)
        scale, least, error = _try_least(x, w, first, n, limit, highest, sums, inverse, scale, least, error)
    return scale, least


@inlined
def _try_least(
    x: Any, w: Any, first: int, n: int, limit: int, highest: float, sums: Any, inverse: Any, scale: Any, least: Any,
    error: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The best scale and least for the codes that `inverse`, counted from `least`, makes, where their error is less."""
    sum_w, sum_wx, sum_wxx = sums
    wq, wqq, wqx = splat(F32x16, 0), splat(F32x16, 0), splat(F32x16, 0)
    origin = inverse * least
    for k in range(first, first + n):
        q = clamp(rint(inverse * x[k] - origin), 0, limit)
        p = w[k] * q
        wq = wq + p
        wqq = wqq + p * q
        wqx = wqx + p * x[k]
    determinant = sum_w * wqq - wq * wq
    alike = determinant <= f32(1e-6) * sum_w * wqq  # all codes are equal, or nearly: least stays as it is
    one_over = 1 / select(alike, 1, determinant)
    new_least = select(alike, least, minimum((wqq * sum_wx - wq * wqx) * one_over, highest))
    new_scale = (sum_w * wqx - sum_wx * wq) * one_over
    new_scale = select(alike | (new_least == highest), (wqx - new_least * wq) / maximum(wqq, TINY), new_scale)
    # (scale q + least - x)^2, multiplied out; where least is not the best for the codes, more terms stay
    new_error = (
        sum_wxx - new_scale * wqx - new_least * sum_wx
        + new_scale * (new_scale * wqq + new_least * wq - wqx)
        + new_least * (new_least * sum_w + new_scale * wq - sum_wx)
    )  # fmt: skip
    better = new_error < error
    return select(better, new_scale, scale), select(better, new_least, least), select(better, new_error, error)
