"""Float32 to IQ4_NL, IQ4_XS and MXFP4: the bytes of ggml's quantize_row_iq4_nl_impl and quantize_row_mxfp4_ref.

IQ4_NL and IQ4_XS, with importance or without: sixteen blocks at a time, one per lane. Each run of 32 weights is fitted
on its own, x ~ scale * IQ4_VALUES[q]; IQ4_XS then codes the eight scales of a block in six bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import nonlinear
from ..base import Floats
from ..simd import (
    LANE,
    F32x16,
    I32x16,
    VectorConstant,
    clamp,
    convert,
    inlined,
    kernel,
    load,
    load_transposed,
    lookup,
    maximum,
    minimum,
    reduce_max,
    scratch,
    select,
    splat,
    sqrt,
    store_half,
)
from . import Bytes
from .fit import NEGLIGIBLE
from .layouts import offsets
from .legacy_encode import store_nibbles
from .nearest import nearest_int
from .nonlinear_decode import IQ4_VALUES, power_of_two

IQ4_NL, IQ4_XS, MXFP4 = (offsets(dtype) for dtype in nonlinear.TABLE)
f32 = np.float32
LEAST = f32(nonlinear.IQ4_VALUES[0])
_VALUES = np.array(nonlinear.IQ4_VALUES)
# Between values q - 1 and q; halfway, the higher is taken. Item 0 is never used.
MIDDLES: Any = VectorConstant(F32x16, [-np.inf, *(_VALUES[:-1] + _VALUES[1:]) / 2])


@kernel
def encode_iq4_nl(values: Floats, blocks: Bytes) -> None:
    """x ~ d * IQ4_VALUES[q], the best of 16 scales; the error of x counts as x^2."""
    x, w = scratch(F32x16, 32), scratch(F32x16, 32)
    n_blocks = blocks.size // IQ4_NL.nbytes
    for group in range(0, n_blocks, 16):
        _load_run(values, 32 * minimum(LANE + group, n_blocks - 1), x)
        _weigh_by_square(x, w)
        _store_iq4_nl(values, group, _fit(x, w), blocks)


@kernel
def encode_iq4_nl_weighted(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """As encode_iq4_nl; the error of x counts as importance * sqrt(twice the block's mean square + x^2)."""
    x, w = scratch(F32x16, 32), scratch(F32x16, 32)
    n_blocks = blocks.size // IQ4_NL.nbytes
    blocks_per_row = importance.size // 32
    for group in range(0, n_blocks, 16):
        block = minimum(LANE + group, n_blocks - 1)
        _load_run(values, 32 * block, x)
        _load_run(importance, 32 * (block - block // blocks_per_row * blocks_per_row), w)
        _weigh_by_importance(x, w, _add_squares(x, splat(F32x16, 0)) * f32(2 / 32))
        _store_iq4_nl(values, group, _fit(x, w), blocks)


@kernel
def encode_iq4_xs(values: Floats, blocks: Bytes) -> None:
    """x ~ d * (scale - 32) * IQ4_VALUES[q], the best of 16 scales per sub-block; the error of x counts as x^2."""
    x, w, scales = scratch(F32x16, 32), scratch(F32x16, 32), scratch(F32x16, 8)
    n_blocks = blocks.size // IQ4_XS.nbytes
    for group in range(0, n_blocks, 16):
        start = 256 * minimum(LANE + group, n_blocks - 1)
        for j in range(8):
            _load_run(values, start + 32 * j, x)
            _weigh_by_square(x, w)
            scales[j] = _fit(x, w)
        _store_iq4_xs(values, group, scales, blocks)


@kernel
def encode_iq4_xs_weighted(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """As encode_iq4_xs; the error of x counts as importance * sqrt(twice the block's mean square + x^2)."""
    x, w, scales = scratch(F32x16, 32), scratch(F32x16, 32), scratch(F32x16, 8)
    n_blocks = blocks.size // IQ4_XS.nbytes
    blocks_per_row = importance.size // 256
    for group in range(0, n_blocks, 16):
        block = minimum(LANE + group, n_blocks - 1)
        column = 256 * (block - block // blocks_per_row * blocks_per_row)
        sum_of_squares = splat(F32x16, 0)
        for j in range(8):
            _load_run(values, 256 * block + 32 * j, x)
            sum_of_squares = _add_squares(x, sum_of_squares)
        for j in range(8):
            _load_run(values, 256 * block + 32 * j, x)
            _load_run(importance, column + 32 * j, w)
            _weigh_by_importance(x, w, sum_of_squares * f32(2 / 256))
            scales[j] = _fit(x, w)
        _store_iq4_xs(values, group, scales, blocks)


@kernel
def encode_mxfp4(values: Floats, blocks: Bytes) -> None:
    """2^(e - 128) is an eighth of the power of two next below the largest magnitude; codes are the nearest values.

    For magnitudes below 2^-125 ggml's e would be negative, and wraps around; here it is 0.
    """
    for b in range(blocks.size // MXFP4.nbytes):
        block = b * MXFP4.nbytes
        first, second = load(F32x16, values, 32 * b), load(F32x16, values, 32 * b + 16)
        largest = reduce_max(maximum(abs(first), abs(second)))
        # C's log2f rounds to float32, which makes it whole for magnitudes just below a power of two.
        exponent = math.floor(f32(math.log2(np.float64(largest)))) if largest > 0 else -125
        e = min(max(exponent + 125, 0), 254)
        blocks[block + MXFP4.e] = e
        d = power_of_two(e)
        store_nibbles(blocks, block + MXFP4.qs, _nearest_mxfp4(first, d), _nearest_mxfp4(second, d))


@inlined
def _nearest_mxfp4(x: Any, d: Any) -> Any:
    """The codes q for which d * MXFP4_VALUES[q] is nearest to x; halfway, the one nearer to 0. A zero has no sign."""
    magnitude = abs(x)
    q = splat(I32x16, 0)
    for middle in (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0):
        q = q + select(magnitude > d * middle, 1, 0)
    return q | select((x < 0) & (q > 0), 8, 0)


@inlined
def _load_run(array: Floats, starts: Any, into: Any) -> None:
    """The 32 numbers from each of starts on."""
    load_transposed(array, starts, into, 0)
    load_transposed(array, starts, into, 16)


@inlined
def _weigh_by_square(x: Any, w: Any) -> None:
    for k in range(32):
        w[k] = x[k] * x[k]


@inlined
def _weigh_by_importance(x: Any, w: Any, twice_the_mean_square: Any) -> None:
    """w: the importances, and then what errors count."""
    for k in range(32):
        w[k] = w[k] * sqrt(twice_the_mean_square + x[k] * x[k])


@inlined
def _add_squares(x: Any, total: Any) -> Any:
    for k in range(32):
        total = total + x[k] * x[k]
    return total


@inlined
def _fit(x: Any, w: Any) -> Any:
    """The scale of runs of 32 weights, x ~ scale * IQ4_VALUES[q], that leaves the least of 16 errors.

    Tries IQ4_VALUES[0], and numbers up to 7 from it, as what the weight of largest magnitude is a multiple of, each
    with the best scale for the codes it makes, sum(w v x) / sum(w v v). A negligible run has scale 0.
    """
    m = splat(F32x16, 0)
    for k in range(32):
        m = select(abs(x[k]) > abs(m), x[k], m)
    counts = abs(m) >= NEGLIGIBLE
    m = select(counts, m, 1)

    wvx, wvv = _products(x, w, 1 / (-m / LEAST))
    scale = select(wvv > 0, wvx / wvv, 0)
    gain = scale * wvx  # by how much these codes lower the error below that of all zeros
    for step in range(-7, 8):
        wvx, wvv = _products(x, w, (f32(step) + LEAST) / m)
        better = (wvv > 0) & (wvx * wvx > gain * wvv)
        scale = select(better, wvx / wvv, scale)
        gain = select(better, scale * wvx, gain)
    return select(counts, scale, 0)


@inlined
def _products(x: Any, w: Any, inverse: Any) -> tuple[Any, Any]:
    """sum(w v x) and sum(w v v) for the values v nearest to inverse * x."""
    wvx, wvv = splat(F32x16, 0), splat(F32x16, 0)
    for k in range(32):
        v = lookup(IQ4_VALUES, nearest_iq4(inverse * x[k]))
        wvx = wvx + w[k] * v * x[k]
        wvv = wvv + w[k] * v * v
    return wvx, wvv


@inlined
def nearest_iq4(x: Any) -> Any:
    """The codes of the values nearest to x, 15 for NaN, by bisection: ggml's best_index_int8."""
    q = splat(I32x16, 0)
    for bit in (8, 4, 2, 1):
        q = select(x < lookup(MIDDLES, q | bit), q, q | bit)
    return q


@inlined
def _store_codes(values: Floats, start: int, inverse: Any, blocks: Bytes, qs: int) -> None:
    """Codes the 32 weights at start, inverse being one over their scale."""
    first = nearest_iq4(inverse * load(F32x16, values, start))
    second = nearest_iq4(inverse * load(F32x16, values, start + 16))
    store_nibbles(blocks, qs, first, second)


@inlined
def _store_iq4_nl(values: Floats, group: int, scales: Any, blocks: Bytes) -> None:
    """Writes blocks group to group + 15, as many as there are, their scales in the lanes."""
    inverses = select(scales != 0, 1 / scales, 0)
    for lane in range(min(16, blocks.size // IQ4_NL.nbytes - group)):
        block = (group + lane) * IQ4_NL.nbytes
        store_half(blocks, block + IQ4_NL.d, scales[lane])
        if scales[lane] != scales[lane]:  # sums beyond float32: the NaN of x86-64, whose sign is set, on others, too
            blocks[block + IQ4_NL.d + 1] = 0xFE
        _store_codes(values, 32 * (group + lane), inverses[lane], blocks, block + IQ4_NL.qs)


@inlined
def _store_iq4_xs(values: Floats, group: int, scales: Any, blocks: Bytes) -> None:
    """Writes blocks group to group + 15, as many as there are. scales: of their j-th sub-blocks, in the lanes of j."""
    largest = splat(F32x16, 0)
    for j in range(8):
        largest = select(abs(scales[j]) > abs(largest), scales[j], largest)
    d = -largest / f32(32)
    one_over_d = select(d != 0, 1 / d, 0)
    codes = scratch(F32x16, 8)
    for j in range(8):
        codes[j] = clamp(nearest_int(one_over_d * scales[j]), -32, 31)
    store_iq4_xs(values, group, d, codes, blocks)


@inlined
def store_iq4_xs(values: Floats, group: int, d: Any, scale_codes: Any, blocks: Bytes) -> None:
    """Writes blocks group to group + 15, as many as there are. scale_codes: eight per block, -32 .. 31, as floats."""
    codes, inverses = scratch(I32x16, 8), scratch(F32x16, 8)
    for j in range(8):
        codes[j] = convert(I32x16, scale_codes[j]) + 32
        inverses[j] = select(d * scale_codes[j] != 0, 1 / (d * scale_codes[j]), 0)
    for lane in range(min(16, blocks.size // IQ4_XS.nbytes - group)):
        block = (group + lane) * IQ4_XS.nbytes
        store_half(blocks, block + IQ4_XS.d, d[lane])
        for half in range(2):
            high = 0
            for k in range(4):
                high |= codes[4 * half + k][lane] >> 4 << (2 * k)
            blocks[block + IQ4_XS.scales_h + half] = high
        for j in range(0, 8, 2):
            blocks[block + IQ4_XS.scales_l + j // 2] = (codes[j][lane] & 15) | (codes[j + 1][lane] & 15) << 4
        for j in range(8):
            start, qs = 256 * (group + lane) + 32 * j, block + IQ4_XS.qs + 16 * j
            _store_codes(values, start, inverses[j][lane], blocks, qs)
