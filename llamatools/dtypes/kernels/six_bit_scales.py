"""The scales and minima of Q4_K and Q5_K: eight of each per block, six bits each, in twelve bytes.

Of the first four sub-blocks, byte j holds scale j and byte 4 + j minimum j, in the low six bits. Of the last four,
byte 4 + j holds the low halves of scale j and minimum j; their upper two bits fill up bytes j - 4 and j.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..simd import F32x16, I32x16, convert, inlined, maximum, minimum, scratch, select, splat
from . import Bytes
from .fit import NEGLIGIBLE
from .nearest import nearest_int

f32 = np.float32
LIMIT = 63


@inlined
def unpack(blocks: Bytes, packed: int, j: int) -> tuple[Any, Any]:
    """Scale and minimum of sub-block j, as float32, from the twelve bytes at `packed`."""
    if j < 4:
        return f32(blocks[packed + j] & 63), f32(blocks[packed + 4 + j] & 63)
    halves = blocks[packed + 4 + j]
    scale = (halves & 15) | (blocks[packed + j - 4] >> 6 << 4)
    least = (halves >> 4) | (blocks[packed + j] >> 6 << 4)
    return f32(scale), f32(least)


@inlined
def pack(blocks: Bytes, packed: int, scales: Any, minima: Any, lane: int) -> None:
    """Puts one lane of the codes of eight scales and minima, scratch of I32x16, into the twelve bytes at `packed`.

    Codes above 63 lose bits, or spill them into others', as in ggml.
    """
    for j in range(4):
        scale, least = scales[4 + j][lane], minima[4 + j][lane]
        blocks[packed + j] = scales[j][lane] | (scale >> 4 << 6)
        blocks[packed + 4 + j] = minima[j][lane] | (least >> 4 << 6)
        blocks[packed + 8 + j] = (scale & 15) | ((least & 15) << 4)


@inlined
def code_by_largest(x: Any, codes: Any) -> Any:
    """Codes 0 .. 63 for eight numbers per lane, the largest of them being 63. Returns the unit of the codes.

    x: scratch of F32x16; codes: scratch of I32x16, filled. A negative x becomes 63, as in ggml, where it wraps.
    """
    largest = splat(F32x16, 0)
    for j in range(8):
        largest = maximum(x[j], largest)
    inverse = select(largest > 0, f32(LIMIT) / largest, 0)
    for j in range(8):
        codes[j] = minimum(convert(I32x16, nearest_int(inverse * x[j])) & 255, LIMIT)
    return largest / f32(LIMIT)


@inlined
def code_by_least_error(x: Any, w: Any, codes: Any, highest: int) -> Any:
    """Codes 0 .. 63 for eight numbers per lane, x ~ unit * code, of small sum w * (x - unit * code)^2: make_qp_quants.

    Tries nine units near that which makes the largest x 63, then, up to five times over, changes each code on its own
    to what is best beside the others. Returns the unit. x, w: scratch of F32x16; codes: scratch of I32x16, filled.
    A negative x gets a code that wraps around at 256, as in ggml, which stores it in a byte; then at most `highest`.
    """
    largest = splat(F32x16, 0)
    for j in range(8):
        largest = maximum(largest, x[j])
    counts = largest >= NEGLIGIBLE
    inverse = _best_inverse(x, w, largest)

    q = scratch(F32x16, 8)
    wxq, wqq = splat(F32x16, 0), splat(F32x16, 0)
    for j in range(8):
        code = minimum(nearest_int(inverse * x[j]), LIMIT)
        wxq = wxq + w[j] * x[j] * code
        wqq = wqq + w[j] * code * code
        q[j] = _in_a_byte(code)
    for _ in range(5):
        for j in range(8):
            others_wxq = wxq - w[j] * x[j] * q[j]
            others_wqq = wqq - w[j] * q[j] * q[j]
            code = minimum(nearest_int(x[j] * others_wqq / others_wxq), LIMIT)
            new_wxq = others_wxq + w[j] * x[j] * code
            new_wqq = others_wqq + w[j] * code * code
            better = (others_wxq > 0) & (others_wqq > 0) & (code != q[j])
            better = better & (new_wxq * new_wxq * wqq > wxq * wxq * new_wqq)
            q[j] = select(better, _in_a_byte(code), q[j])
            wxq = select(better, new_wxq, wxq)
            wqq = select(better, new_wqq, wqq)
    for j in range(8):
        codes[j] = convert(I32x16, select(counts, minimum(q[j], highest), 0))
    return select(counts & (wqq > 0), wxq / wqq, 0)


@inlined
def _best_inverse(x: Any, w: Any, largest: Any) -> Any:
    """1 / unit: (63 + i / 10) / largest for i from -4 to 4 that leaves the least error; 0 before all others."""
    inverse = f32(LIMIT) / largest
    unit = 1 / inverse
    error = splat(F32x16, 0)
    for j in range(8):
        difference = x[j] - unit * _in_a_byte(nearest_int(inverse * x[j]))
        error = error + w[j] * difference * difference
    for i in range(-4, 5):
        if i != 0:
            tried = (f32(0.1) * f32(i) + f32(LIMIT)) / largest
            unit = 1 / tried
            new_error = splat(F32x16, 0)
            for j in range(8):
                difference = x[j] - unit * minimum(nearest_int(tried * x[j]), LIMIT)
                new_error = new_error + w[j] * difference * difference
            inverse = select(new_error < error, tried, inverse)
            error = select(new_error < error, new_error, error)
    return inverse


@inlined
def _in_a_byte(code: Any) -> Any:
    """What is left of a whole number that C stores in a uint8_t."""
    return convert(F32x16, convert(I32x16, code) & 255)
