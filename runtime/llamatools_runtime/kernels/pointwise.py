"""What is done to each token by itself: norms, gates, sums, rotary embedding; and the exponential function."""

from __future__ import annotations

from typing import Any

import numpy as np

from llamatools.dtypes.simd import (
    F32x16,
    I32x16,
    I64x16,
    array_at,
    bitcast,
    clamp,
    convert,
    inlined,
    kernel,
    load,
    multiply_add,
    reduce_add,
    rint,
    select,
    splat,
    sqrt,
    store,
)

# Fields of a job from 4 on, see job.py
X, X_STRIDE = 4, 5  # float32 (n_tokens, n) to read, and floats from a token to the next
Y = 6  # float32 (n_tokens, n) to write
N = 7
WEIGHT, EPS = 8, 9  # of norm: float32 (n,), and the bits of a float32
OTHER, OTHER_STRIDE = 8, 9  # of gate and add: float32 (n_tokens, n), and floats from a token to the next
TURN, HEAD_DIM = 8, 9  # of rotate: float32 (n_tokens, head_dim), cos and sin for each pair of a head

f32 = np.float32
LOG2_E, LN2_HIGH, LN2_LOW = f32(1.4426950408889634), f32(0.693359375), f32(-2.12194440e-4)  # ln 2 = high + low


@inlined
def exp(x: Any) -> Any:
    """e ** x of an F32x16, within 2 units in the last place; 0 from -88 down, infinity above 88, NaN of NaN.

    x = n ln 2 + r with a whole n; e ** r by its Taylor series, r being at most 0.35, and 2 ** n is an exponent's bits.
    """
    limited = clamp(x, -88.0, 88.0)
    n = rint(limited * LOG2_E)
    r = (limited - n * LN2_HIGH) - n * LN2_LOW
    series = multiply_add(r, f32(1 / 720), splat(F32x16, f32(1 / 120)))
    series = multiply_add(series, r, splat(F32x16, f32(1 / 24)))
    series = multiply_add(series, r, splat(F32x16, f32(1 / 6)))
    series = multiply_add(series, r, splat(F32x16, f32(1 / 2)))
    series = multiply_add(series, r, splat(F32x16, f32(1)))
    series = multiply_add(series, r, splat(F32x16, f32(1)))
    power = bitcast(F32x16, (convert(I32x16, n) + 127) << 23)
    return select(x <= 88, series * power, x * f32(np.inf))  # NaN of NaN


@kernel
def norm(job: int, start: int, stop: int) -> None:
    """y = weight * x / sqrt(mean(x ** 2) + eps), of the tokens start to stop."""
    fields = array_at(I64x16, job)
    x, y, weight = array_at(F32x16, fields[X]), array_at(F32x16, fields[Y]), array_at(F32x16, fields[WEIGHT])
    n = fields[N]
    eps = bitcast(F32x16, splat(I32x16, fields[EPS]))[0]
    whole = n // 16 * 16
    for token in range(start, stop):
        from_, to = token * fields[X_STRIDE], token * n
        squares = splat(F32x16, 0)
        for i in range(0, whole, 16):
            numbers = load(F32x16, x, from_ + i)
            squares = multiply_add(numbers, numbers, squares)
        total = reduce_add(squares)
        for i in range(whole, n):
            total += x[from_ + i] * x[from_ + i]
        scale = splat(F32x16, 1) / sqrt(splat(F32x16, total / f32(n) + eps))
        for i in range(0, whole, 16):
            store(y, to + i, load(F32x16, x, from_ + i) * scale * load(F32x16, weight, i))
        for i in range(whole, n):
            y[to + i] = x[from_ + i] * scale[0] * weight[i]


@kernel
def gate(job: int, start: int, stop: int) -> None:
    """y = silu(x) * up, of the tokens start to stop."""
    fields = array_at(I64x16, job)
    x, y, up = array_at(F32x16, fields[X]), array_at(F32x16, fields[Y]), array_at(F32x16, fields[OTHER])
    n = fields[N]
    whole = n // 16 * 16
    for token in range(start, stop):
        from_, also, to = token * fields[X_STRIDE], token * fields[OTHER_STRIDE], token * n
        for i in range(0, whole, 16):
            store(y, to + i, _silu(load(F32x16, x, from_ + i)) * load(F32x16, up, also + i))
        for i in range(whole, n):
            y[to + i] = _silu(splat(F32x16, x[from_ + i]))[0] * up[also + i]


@kernel
def add(job: int, start: int, stop: int) -> None:
    """y = x + other, of the tokens start to stop."""
    fields = array_at(I64x16, job)
    x, y, other = array_at(F32x16, fields[X]), array_at(F32x16, fields[Y]), array_at(F32x16, fields[OTHER])
    for token in range(start, stop):
        from_, also, to = token * fields[X_STRIDE], token * fields[OTHER_STRIDE], token * fields[N]
        for i in range(fields[N]):
            y[to + i] = x[from_ + i] + other[also + i]


@kernel
def rotate(job: int, start: int, stop: int) -> None:
    """y = x with each pair of each head turned, of the tokens start to stop."""
    fields = array_at(I64x16, job)
    x, y, turn = array_at(F32x16, fields[X]), array_at(F32x16, fields[Y]), array_at(F32x16, fields[TURN])
    n, head_dim = fields[N], fields[HEAD_DIM]
    for token in range(start, stop):
        for head in range(0, n, head_dim):
            from_, by, to = token * fields[X_STRIDE] + head, token * head_dim, token * n + head
            for i in range(0, head_dim, 2):
                a, b, cos, sin = x[from_ + i], x[from_ + i + 1], turn[by + i], turn[by + i + 1]
                y[to + i] = a * cos - b * sin
                y[to + i + 1] = a * sin + b * cos


@inlined
def _silu(x: Any) -> Any:
    return x / (exp(-x) + 1)
