"""Float32 to blocks of 32 weights, each weight as important as the next: the bytes of ggml's quantize_row_*_ref.

A scale is rounded to float16 for the file, but codes are made with the scale as it was before. ggml converts what is
not a number to codes that its C leaves undefined (where 1 / d is infinite, because all weights are below 1e-37 or so);
here such a block gets the codes of zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import legacy
from ..base import Floats
from ..simd import (
    F32x16,
    I8x16,
    I32x16,
    U8x16,
    bitcast,
    bits_of,
    clamp,
    convert,
    inlined,
    kernel,
    lane,
    load,
    maxima,
    maximum,
    minima,
    minimum,
    reduce_max,
    reduce_min,
    round_half_away,
    scratch,
    select,
    set_lane,
    store,
    store_half,
)
from . import Bytes
from .layouts import offsets

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = (offsets(dtype) for dtype in legacy.TABLE)
f32 = np.float32


@kernel
def encode_q4_0(values: Floats, blocks: Bytes) -> None:
    """d = m / -8, where m is the weight of largest magnitude; q = floor(x / d + 8.5), at most 15."""
    scales = scratch(F32x16, 2)
    n_blocks = blocks.size // Q4_0.nbytes
    for group in range(0, n_blocks, 16):
        count = min(16, n_blocks - group)
        _fit_largest(values, group, count, -8, scales)
        for k in range(count):
            block, inverse = (group + k) * Q4_0.nbytes, lane(scales, 1, k)
            first, second = _weights(values, group + k)
            store_half(blocks, block + Q4_0.d, lane(scales, 0, k))
            low = convert(I32x16, minimum(first * inverse + 8.5, 15))
            high = convert(I32x16, minimum(second * inverse + 8.5, 15))
            store_nibbles(blocks, block + Q4_0.qs, low, high)


@kernel
def encode_q4_1(values: Floats, blocks: Bytes) -> None:
    """m is the least weight; d = (greatest - m) / 15; q = floor((x - m) / d + 0.5), at most 15."""
    for b in range(blocks.size // Q4_1.nbytes):
        block = b * Q4_1.nbytes
        first, second = _weights(values, b)
        m, greatest = _extremes(first, second)
        d = (greatest - m) / f32(15)
        inverse = _reciprocal(d)
        store_half(blocks, block + Q4_1.d, d)
        store_half(blocks, block + Q4_1.m, m)
        low = convert(I32x16, clamp((first - m) * inverse + 0.5, 0, 15))
        high = convert(I32x16, clamp((second - m) * inverse + 0.5, 0, 15))
        store_nibbles(blocks, block + Q4_1.qs, low, high)


@kernel
def encode_q5_0(values: Floats, blocks: Bytes) -> None:
    """d = m / -16, where m is the weight of largest magnitude; q = floor(x / d + 16.5), at most 31."""
    scales = scratch(F32x16, 2)
    n_blocks = blocks.size // Q5_0.nbytes
    for group in range(0, n_blocks, 16):
        count = min(16, n_blocks - group)
        _fit_largest(values, group, count, -16, scales)
        for k in range(count):
            block, inverse = (group + k) * Q5_0.nbytes, lane(scales, 1, k)
            first, second = _weights(values, group + k)
            store_half(blocks, block + Q5_0.d, lane(scales, 0, k))
            low = convert(I32x16, minimum(first * inverse + 16.5, 31))
            high = convert(I32x16, minimum(second * inverse + 16.5, 31))
            store_five_bits(blocks, block + Q5_0.qs, block + Q5_0.qh, low, high)


@kernel
def encode_q5_1(values: Floats, blocks: Bytes) -> None:
    """m is the least weight; d = (greatest - m) / 31; q = floor((x - m) / d + 0.5), at most 31."""
    for b in range(blocks.size // Q5_1.nbytes):
        block = b * Q5_1.nbytes
        first, second = _weights(values, b)
        m, greatest = _extremes(first, second)
        d = (greatest - m) / f32(31)
        inverse = _reciprocal(d)
        store_half(blocks, block + Q5_1.d, d)
        store_half(blocks, block + Q5_1.m, m)
        low = convert(I32x16, clamp((first - m) * inverse + 0.5, 0, 31))
        high = convert(I32x16, clamp((second - m) * inverse + 0.5, 0, 31))
        store_five_bits(blocks, block + Q5_1.qs, block + Q5_1.qh, low, high)


@kernel
def encode_q8_0(values: Floats, blocks: Bytes) -> None:
    """d = largest magnitude / 127; q = x / d, rounded half away from zero."""
    for b in range(blocks.size // Q8_0.nbytes):
        block = b * Q8_0.nbytes
        first, second = _weights(values, b)
        d = reduce_max(maximum(abs(first), abs(second))) / f32(127)
        inverse = _reciprocal(d)
        store_half(blocks, block + Q8_0.d, d)
        low = convert(I32x16, clamp(round_half_away(first * inverse), -127, 127))
        high = convert(I32x16, clamp(round_half_away(second * inverse), -127, 127))
        store(blocks, block + Q8_0.qs, convert(I8x16, low))
        store(blocks, block + Q8_0.qs + 16, convert(I8x16, high))


@inlined
def _fit_largest(values: Floats, group: int, count: int, code: int, scales: Any) -> None:
    """The scales of `count` blocks from `group` on, by which the weight of largest magnitude gets `code`.

    Fills scales, scratch of two: in lane k the scale of block group + k; and one over it, or 0 where that is not
    finite. Of weights that are largest with either sign, the first decides. Where all are 0, so is the scale.
    """
    greatest_of, least_of = scratch(F32x16, 16), scratch(F32x16, 16)
    for k in range(16):
        first, second = _weights(values, group + min(k, count - 1))
        greatest_of[k] = maximum(first, second)
        least_of[k] = minimum(first, second)
    greatest, least = maxima(greatest_of), minima(least_of)
    largest = select(greatest > -least, greatest, least)
    undecided = bits_of((greatest == -least) & (greatest != 0))
    if undecided:
        scales[0] = largest
        for k in range(count):
            if undecided >> np.uint32(k) & np.uint32(1):
                first, second = _weights(values, group + k)
                magnitude = lane(scales, 0, k)
                magnitude = abs(magnitude)
                equal = _bits(abs(first) == magnitude, abs(second) == magnitude)
                is_negative = _bits(first < 0, second < 0) & _lowest(equal)
                set_lane(scales, 0, k, -magnitude if is_negative else magnitude)
        largest = scales[0]
    d = (largest + 0) / f32(code)  # where + 0 turns -0 into 0
    inverse = 1 / d
    scales[0] = d
    scales[1] = select(abs(inverse) < f32(np.inf), inverse, 0)


@inlined
def _weights(values: Floats, block: int) -> tuple[Any, Any]:
    """The first and the last sixteen weights of a block of 32."""
    return load(F32x16, values, 32 * block), load(F32x16, values, 32 * block + 16)


@inlined
def _extremes(first: Any, second: Any) -> tuple[Any, Any]:
    """The least and the greatest weight; the first of equals, which matters for the sign of a zero only."""
    least = reduce_min(minimum(first, second))
    greatest = reduce_max(maximum(first, second))
    if least == 0:
        zero = _bits(first == 0, second == 0)
        signs = _bits(bitcast(I32x16, first) < 0, bitcast(I32x16, second) < 0)
        least = f32(-0.0) if signs & _lowest(zero) else f32(0)
        if greatest == 0:
            greatest = least
    return least, greatest


@inlined
def _bits(first: Any, second: Any) -> Any:
    """Two masks as one number: bit k is lane k of the first, bit 16 + k of the second."""
    return bits_of(first) | bits_of(second) << np.uint32(16)


@inlined
def _lowest(bits: Any) -> Any:
    """The lowest bit that is set, alone."""
    return bits & (~bits + np.uint32(1))


@inlined
def _reciprocal(d: Any) -> Any:
    """1 / d, or 0 where that is not finite."""
    inverse = f32(1) / d
    return inverse if abs(inverse) < f32(np.inf) else f32(0)


@inlined
def store_nibbles(blocks: Bytes, qs: int, low: Any, high: Any) -> None:
    """Sixteen codes into low halves of the bytes at qs, sixteen into their high halves. low, high: I32x16 below 16."""
    store(blocks, qs, convert(U8x16, low | (high << 4)))


@inlined
def store_five_bits(blocks: Bytes, qs: int, qh: int, low: Any, high: Any) -> None:
    """As store_nibbles, with fifth bits, little-endian, at qh. low, high: I32x16 below 32."""
    store_nibbles(blocks, qs, low & 15, high & 15)
    fifths = _bits(low >= 16, high >= 16)
    for k in range(4):
        blocks[qh + k] = (fifths >> np.uint32(8 * k)) & np.uint32(255)
