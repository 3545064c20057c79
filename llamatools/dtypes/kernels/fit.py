"""Searches for the scale, or the scale and minimum, that make the least weighted error: ggml's, step by step.

Each lane fits a run of weights of its own, in the order of ggml's C, so that every sum is rounded as there. `x` and `w`
are scratch of F32x16: x[k] holds the k-th weight of each lane's run, w[k] how much its error counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..simd import F32x16, clamp, inlined, maximum, minimum, rint, scratch, select, splat

f32 = np.float32
NEGLIGIBLE = f32(1e-15)  # ggml's GROUP_MAX_EPS: a run of nothing larger counts as zero


@inlined
def fit_scale(x: Any, w: Any, n: int, limit: int) -> tuple[Any, Any, Any]:
    """Codes q in -limit .. limit - 1 for runs of n weights, x ~ scale * q: ggml's make_qx_quants.

    Tries -limit, and 18 values near it, as the code of the weight m of largest magnitude; keeps the codes that leave
    the least of sum w * (x - scale * q)^2 under their own best scale, sum(w x q) / sum(w q q).

    Returns scale; inverse, the codes being rint(inverse * x) limited to their range; and the mask of the lanes that
    are not negligible. The others have scale 0 and, as these codes, zeros.
    """
    m = splat(F32x16, 0)
    for k in range(n):
        m = select(abs(x[k]) > abs(m), x[k], m)
    counts = abs(m) >= NEGLIGIBLE
    m = select(counts, m, 1)

    wx = scratch(F32x16, 32)
    for k in range(n):
        wx[k] = w[k] * x[k]
    inverse = f32(-limit) / m
    wxq, wqq = _products(x, w, wx, n, limit, inverse)
    scale = select(wqq != 0, wxq / wqq, 0)
    gain = scale * wxq  # by how much these codes lower the error below that of all zeros
    for step in range(-9, 10):
        if step != 0:
            tried = -(f32(limit) + f32(0.1) * f32(step)) / m
            wxq, wqq = _products(x, w, wx, n, limit, tried)
            better = (wqq > 0) & (wxq * wxq > gain * wqq)
            inverse = select(better, tried, inverse)
            scale = select(better, wxq / wqq, scale)
            gain = select(better, scale * wxq, gain)
    return select(counts, scale, 0), inverse, counts


@inlined
def _products(x: Any, w: Any, wx: Any, n: int, limit: int, inverse: Any) -> tuple[Any, Any]:
    """sum(w x q) and sum(w q q) for the codes q that `inverse` makes. wx: w * x, which is the same for all."""
    wxq, wqq = splat(F32x16, 0), splat(F32x16, 0)
    for k in range(n):
        q = clamp(rint(inverse * x[k]), -limit, limit - 1)
        wxq = wxq + wx[k] * q
        wqq = wqq + w[k] * q * q
    return wxq, wqq


@inlined
def fit_scale_and_minimum(
    x: Any, w: Any, n: int, limit: int, first: float, step: float, n_steps: int
) -> tuple[Any, Any, Any, Any]:
    """Codes q in 0 .. limit for runs of n weights, x ~ scale * q + least, least <= 0: ggml's make_qkx2 and qkx3_quants.

    Starts with the codes that span the run, from its least weight (or 0) to its greatest. Then, n_steps + 1 times, lets
    the span have limit + first + i * step codes instead, counted from the best `least` so far, and solves for the scale
    and least of smallest error sum w * (x - scale * q - least)^2 under them. (A least above 0 becomes 0.)

    Returns scale; least; and (inverse, origin), the codes being rint(inverse * (x - origin)) limited to their range.
    A run of equal weights, none below 0, has scale and inverse 0.
    """
    least, greatest = x[0], x[0]
    sum_w = w[0]
    sum_wx = w[0] * x[0]
    for k in range(1, n):
        least = minimum(x[k], least)
        greatest = maximum(x[k], greatest)
        sum_w = sum_w + w[k]
        sum_wx = sum_wx + w[k] * x[k]
    least = select(least > 0, 0, least)
    spans = greatest > least

    codes = scratch(F32x16, 32)
    origin = least
    inverse = f32(limit) / select(spans, greatest - least, 1)
    scale = 1 / inverse
    inverse = select(inverse < f32(np.inf), inverse, 0)  # ggml codes spans so small that this overflows as 0
    for k in range(n):
        codes[k] = clamp(rint(inverse * (x[k] - least)), 0, limit)
    error = _error(x, w, n, codes, scale, least)

    for i in range(n_steps + 1):
        tried = (f32(first) + f32(step) * f32(i) + f32(limit)) / (greatest - least)
        for k in range(n):
            codes[k] = rint(clamp(tried * (x[k] - least), 0, limit))  # 0 for what is no number, where greatest == least
        wq, wqq, wqx = splat(F32x16, 0), splat(F32x16, 0), splat(F32x16, 0)
        for k in range(n):
            wq_k = w[k] * codes[k]
            wq = wq + wq_k
            wqq = wqq + wq_k * codes[k]
            wqx = wqx + wq_k * x[k]
        determinant = sum_w * wqq - wq * wq
        new_scale = (sum_w * wqx - sum_wx * wq) / determinant
        new_least = (wqq * sum_wx - wq * wqx) / determinant
        above = new_least > 0
        new_least = select(above, 0, new_least)
        new_scale = select(above, wqx / wqq, new_scale)
        new_error = _error(x, w, n, codes, new_scale, new_least)
        better = (determinant > 0) & (new_error < error)
        inverse = select(better, tried, inverse)
        origin = select(better, least, origin)
        error = select(better, new_error, error)
        scale = select(better, new_scale, scale)
        least = select(better, new_least, least)

    # ggml leaves runs without a span before the search.
    return select(spans, scale, 0), least, select(spans, inverse, 0), origin


@inlined
def _error(x: Any, w: Any, n: int, codes: Any, scale: Any, least: Any) -> Any:
    """sum w * (scale * q + least - x)^2"""
    error = splat(F32x16, 0)
    for k in range(n):
        difference = scale * codes[k] + least - x[k]
        error = error + w[k] * (difference * difference)
    return error
