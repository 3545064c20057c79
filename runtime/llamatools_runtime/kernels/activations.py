"""Activations in eight bits: what quantized rows are multiplied by.

x is cut into blocks, and each is stored as d * q with whole q from -127 to 127 and one float32 d: blocks of 32 for
dtypes with blocks of 32, of 256 for those with blocks of 256. The numbers are those of ggml's Q8_0 and Q8_K; like
Q8_0's, d of a block of 32 is rounded to float16, unless that is too narrow for it.

Whatever the blocks, d is stored for every 32 numbers, beside their sum, which settles what a dtype adds to its codes:
(q - 8) . x = q . x - 8 * sum(x), exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llamatools.dtypes.simd import (
    F32x16,
    I8x16,
    I8x64,
    I32x16,
    I64x16,
    U8x64,
    array_at,
    bitcast,
    clamp,
    convert,
    dot,
    float_to_half,
    half_to_float,
    inlined,
    kernel,
    load,
    maximum,
    reduce_add,
    reduce_max,
    rint,
    splat,
    store,
)

from .job import CODES, FIRST_SUMS, N_IN, N_TOKENS, PARTIAL_SUMS, SCALES, SUMS, X

f32 = np.float32
SMALLEST, LARGEST = f32(2.0**-14), f32(65504)  # normal numbers of float16


@kernel
def quantize_by_32(job: int, start: int, stop: int) -> None:
    """Tokens start to stop. Not a number makes d that, and so all that is computed from the block."""
    fields = array_at(I64x16, job)
    x, scales = array_at(F32x16, fields[X]), array_at(F32x16, fields[SCALES])
    n_in, n_tokens = fields[N_IN], fields[N_TOKENS]
    for t in range(start, stop):
        for b in range(n_in // 32):
            at = t * n_in + 32 * b
            largest = _largest(maximum(_magnitude(x, at), _magnitude(x, at + 16)))
            d = largest / f32(127)
            rounded = half_to_float(float_to_half(splat(F32x16, d)))[0]
            scales[b * n_tokens + t] = rounded if SMALLEST <= d <= LARGEST else d
            inverse = f32(127) / largest if largest > 0 else f32(0)
            if n_tokens == 1:
                place = 128 * (b // 4) + 16 * (b % 4)
                _store_codes(fields, x, at, b, t, inverse, place, place + 64)
            else:
                place = 32 * (b * n_tokens + t)
                _store_codes(fields, x, at, b, t, inverse, place, place + 16)
    if n_tokens == 1:
        _fill_up(fields, n_in // 32)
        _sum_by_fours(fields)


@inlined
def _fill_up(fields: Any, n_blocks: int) -> None:
    """Zeros for the blocks that the last four lack."""
    codes, zeros = array_at(I8x16, fields[CODES]), splat(I8x16, 0)
    for b in range(n_blocks, -(-n_blocks // 4) * 4):
        store(codes, 128 * (b // 4) + 16 * (b % 4), zeros)
        store(codes, 128 * (b // 4) + 16 * (b % 4) + 64, zeros)
        array_at(F32x16, fields[SCALES])[b] = 0
        array_at(F32x16, fields[SUMS])[b] = 0


@inlined
def _sum_by_fours(fields: Any) -> None:
    """Of a single token's codes: sums of four of the first and four of the second half of a block, per lane."""
    codes, quads, ones = array_at(I8x16, fields[CODES]), array_at(I32x16, fields[PARTIAL_SUMS]), splat(U8x64, 1)
    for b in range(0, fields[N_IN] // 32, 4):
        store(quads, 4 * b, dot(ones, load(I8x64, codes, 32 * b)) + dot(ones, load(I8x64, codes, 32 * b + 64)))


@kernel
def quantize_by_256(job: int, start: int, stop: int) -> None:
    """Tokens start to stop. Not a number makes d that, and so all that is computed from the block."""
    fields = array_at(I64x16, job)
    x, scales = array_at(F32x16, fields[X]), array_at(F32x16, fields[SCALES])
    partial_sums, n_in, n_tokens = array_at(I32x16, fields[PARTIAL_SUMS]), fields[N_IN], fields[N_TOKENS]
    for t in range(start, stop):
        for block in range(0, n_in // 32, 8):
            at = t * n_in + 32 * block
            magnitudes = _magnitude(x, at)
            for k in range(16, 256, 16):
                magnitudes = maximum(magnitudes, _magnitude(x, at + k))
            largest = _largest(magnitudes)
            inverse = f32(127) / largest if largest > 0 else f32(0)
            d = f32(1) / inverse if largest > 0 else largest
            for b in range(8):
                scales[(block + b) * n_tokens + t] = d
                place = 32 * ((block + b) * n_tokens + t)
                sums = _store_codes(fields, x, at + 32 * b, block + b, t, inverse, place, place + 16)
                if n_tokens == 1:
                    partial_sums[2 * (block + b)], partial_sums[2 * (block + b) + 1] = sums


@inlined
def _magnitude(x: Any, at: int) -> Any:
    """The bits of |x|, which as whole numbers are in the order of |x|, NaN being the largest."""
    return bitcast(I32x16, abs(load(F32x16, x, at)))


@inlined
def _largest(magnitudes: Any) -> Any:
    return bitcast(F32x16, splat(I32x16, reduce_max(magnitudes)))[0]


@inlined
def _store_codes(fields: Any, x: Any, at: int, b: int, t: int, inverse: Any, first_at: int, second_at: int) -> Any:
    """The codes of the 32 numbers at x[at], token t's block b, in two halves, and their sums."""
    codes, j = array_at(I8x16, fields[CODES]), b * fields[N_TOKENS] + t
    first = convert(I32x16, clamp(rint(load(F32x16, x, at) * inverse), -127, 127))
    second = convert(I32x16, clamp(rint(load(F32x16, x, at + 16) * inverse), -127, 127))
    store(codes, first_at, convert(I8x16, first))
    store(codes, second_at, convert(I8x16, second))
    first_sum = reduce_add(first)
    second_sum = reduce_add(second)
    array_at(F32x16, fields[FIRST_SUMS])[j] = first_sum
    array_at(F32x16, fields[SUMS])[j] = first_sum + second_sum
    return first_sum, second_sum
