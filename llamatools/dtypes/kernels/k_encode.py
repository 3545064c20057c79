"""Float32 to Q4_K and Q5_K: the bytes of ggml's quantize_row_q4_K_ref, _q5_K_ref and, with importance, _impl.

Sixteen blocks at a time, one per lane. Each of a block's eight sub-blocks is fitted on its own, x ~ scale * q + least;
the eight scales and minima are then coded in six bits, and the weights coded anew with what the six bits mean.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import k_quants
from ..base import Floats
from ..simd import (
    LANE,
    F32x16,
    I32x16,
    U8x16,
    clamp,
    convert,
    inlined,
    kernel,
    load,
    load_transposed,
    minimum,
    rint,
    scratch,
    splat,
    sqrt,
    store,
    store_half,
)
from . import Bytes
from .fit import fit_scale_and_minimum
from .layouts import offsets
from .legacy_encode import store_nibbles
from .nearest import nearest_int
from .six_bit_scales import code_by_largest, code_by_least_error, pack, unpack

Q4_K, Q5_K = offsets(k_quants.Q4_K), offsets(k_quants.Q5_K)
f32 = np.float32


class Fits(NamedTuple):
    """What sixteen blocks, one per lane, are made of. Scratch: item j is of the blocks' j-th sub-blocks."""

    scales: Any
    minima: Any  # how far below 0 the code 0 lies
    inverses: Any  # with origins: the codes that the fit settled on are rint(inverse * (x - origin)), limited
    origins: Any
    scale_codes: Any
    minimum_codes: Any


@kernel
def encode_q4_k(values: Floats, blocks: Bytes) -> None:
    """x ~ d * scale * q - dmin * minimum, q in 0 .. 15, by 22 spans per sub-block."""
    scales, minima, inverses, origins = scratch(F32x16, 8), scratch(F32x16, 8), scratch(F32x16, 8), scratch(F32x16, 8)
    fits = Fits(scales, minima, inverses, origins, scratch(I32x16, 8), scratch(I32x16, 8))
    n_blocks = blocks.size // Q4_K.nbytes
    for group in range(0, n_blocks, 16):
        d, dmin = _fit(values, group, n_blocks, fits, 15, -1.0, 0.1, 20)
        for lane in range(min(16, n_blocks - group)):
            store_q4_k(values, group + lane, d[lane], dmin[lane], fits, lane, blocks)


@kernel
def encode_q4_k_weighted(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * scale * q - dmin * minimum, q in 0 .. 15, by 38 spans per sub-block."""
    scales, minima, inverses, origins = scratch(F32x16, 8), scratch(F32x16, 8), scratch(F32x16, 8), scratch(F32x16, 8)
    fits = Fits(scales, minima, inverses, origins, scratch(I32x16, 8), scratch(I32x16, 8))
    n_blocks = blocks.size // Q4_K.nbytes
    for group in range(0, n_blocks, 16):
        d, dmin = _fit_weighted(values, importance, group, n_blocks, fits, 15, 255)
        for lane in range(min(16, n_blocks - group)):
            store_q4_k(values, group + lane, d[lane], dmin[lane], fits, lane, blocks)


@kernel
def encode_q5_k(values: Floats, blocks: Bytes) -> None:
    """x ~ d * scale * q - dmin * minimum, q in 0 .. 31, by 17 spans per sub-block."""
    scales, minima, inverses, origins = scratch(F32x16, 8), scratch(F32x16, 8), scratch(F32x16, 8), scratch(F32x16, 8)
    fits = Fits(scales, minima, inverses, origins, scratch(I32x16, 8), scratch(I32x16, 8))
    n_blocks = blocks.size // Q5_K.nbytes
    for group in range(0, n_blocks, 16):
        d, dmin = _fit(values, group, n_blocks, fits, 31, -0.5, 0.1, 15)
        for lane in range(min(16, n_blocks - group)):
            store_q5_k(values, group + lane, d[lane], dmin[lane], fits, lane, blocks)


@kernel
def encode_q5_k_weighted(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * scale * q - dmin * minimum, q in 0 .. 31, by 38 spans per sub-block."""
    scales, minima, inverses, origins = scratch(F32x16, 8), scratch(F32x16, 8), scratch(F32x16, 8), scratch(F32x16, 8)
    fits = Fits(scales, minima, inverses, origins, scratch(I32x16, 8), scratch(I32x16, 8))
    n_blocks = blocks.size // Q5_K.nbytes
    for group in range(0, n_blocks, 16):
        d, dmin = _fit_weighted(values, importance, group, n_blocks, fits, 31, 63)
        for lane in range(min(16, n_blocks - group)):
            store_q5_k(values, group + lane, d[lane], dmin[lane], fits, lane, blocks)


@inlined
def _fit(
    values: Floats, group: int, n_blocks: int, fits: Fits, limit: int, first: float, step: float, n_steps: int
) -> tuple[Any, Any]:
    """Fits blocks group to group + 15; past the end, the last block again. Fills `fits`, returns d and dmin."""
    start = 256 * minimum(LANE + group, n_blocks - 1)
    x, w = scratch(F32x16, 32), scratch(F32x16, 32)
    for j in range(8):
        load_transposed(values, start + 32 * j, x, 0)
        load_transposed(values, start + 32 * j, x, 16)
        sum_of_squares = splat(F32x16, 0)
        for k in range(32):
            sum_of_squares = sum_of_squares + x[k] * x[k]
        mean = sqrt(sum_of_squares / f32(32))
        for k in range(32):
            w[k] = mean + abs(x[k])
        scale, least, inverse, origin = fit_scale_and_minimum(x, w, 32, limit, first, step, n_steps)
        fits.scales[j], fits.minima[j] = scale, -least
        fits.inverses[j], fits.origins[j] = inverse, origin
    return code_by_largest(fits.scales, fits.scale_codes), code_by_largest(fits.minima, fits.minimum_codes)


@inlined
def _fit_weighted(
    values: Floats, importance: Floats, group: int, n_blocks: int, fits: Fits, limit: int, highest_scale: int
) -> tuple[Any, Any]:
    """As _fit, where an error counts as importance * sqrt(twice the block's mean square + x^2)."""
    block = minimum(LANE + group, n_blocks - 1)
    blocks_per_row = importance.size // 256
    column = 256 * (block - block // blocks_per_row * blocks_per_row)
    x, w, sums_of_weights = scratch(F32x16, 32), scratch(F32x16, 32), scratch(F32x16, 8)
    sum_of_squares = splat(F32x16, 0)
    for first in range(0, 256, 16):
        load_transposed(values, 256 * block + first, x, 0)
        for k in range(16):
            sum_of_squares = sum_of_squares + x[k] * x[k]
    twice_the_mean = 2 * sum_of_squares / f32(256)
    for j in range(8):
        for k in range(0, 32, 16):
            load_transposed(values, 256 * block + 32 * j, x, k)
            load_transposed(importance, column + 32 * j, w, k)
        sum_of_weights = splat(F32x16, 0)
        for k in range(32):
            w[k] = w[k] * sqrt(twice_the_mean + x[k] * x[k])
            sum_of_weights = sum_of_weights + w[k]
        sums_of_weights[j] = sum_of_weights
        scale, least, inverse, origin = fit_scale_and_minimum(x, w, 32, limit, -0.9, 0.05, 36)
        fits.scales[j], fits.minima[j] = scale, -least
        fits.inverses[j], fits.origins[j] = inverse, origin
    d = code_by_least_error(fits.scales, sums_of_weights, fits.scale_codes, highest_scale)
    return d, code_by_least_error(fits.minima, sums_of_weights, fits.minimum_codes, highest_scale)


@inlined
def store_q4_k(values: Floats, number: int, d: Any, dmin: Any, fits: Fits, lane: int, blocks: Bytes) -> None:
    """Writes block `number`, which is in `lane` of `fits`."""
    block = number * Q4_K.nbytes
    q = scratch(I32x16, 16)
    _store_scales(values, number, d, dmin, fits, lane, blocks, block, 15, q)
    for j in range(0, 8, 2):
        for half in range(2):
            store_nibbles(blocks, block + Q4_K.qs + 16 * (j + half), q[2 * j + half], q[2 * j + 2 + half])


@inlined
def store_q5_k(values: Floats, number: int, d: Any, dmin: Any, fits: Fits, lane: int, blocks: Bytes) -> None:
    """Writes block `number`, which is in `lane` of `fits`."""
    block = number * Q5_K.nbytes
    q = scratch(I32x16, 16)
    _store_scales(values, number, d, dmin, fits, lane, blocks, block, 31, q)
    for half in range(2):
        fifths = splat(I32x16, 0)
        for j in range(0, 8, 2):
            low, high = q[2 * j + half], q[2 * j + 2 + half]
            store_nibbles(blocks, block + Q5_K.qs + 16 * (j + half), low & 15, high & 15)
            fifths = fifths | (low >> 4 << j) | (high >> 4 << (j + 1))
        store(blocks, block + Q5_K.qh + 16 * half, convert(U8x16, fifths))


@inlined
def _store_scales(
    values: Floats, number: int, d: Any, dmin: Any, fits: Fits, lane: int, blocks: Bytes, block: int, limit: int, q: Any
) -> None:
    """Writes d, dmin, scales and minima, which lie alike in Q4_K and Q5_K; codes the block's weights with them into q.

    Where a scale became 0, the codes are those that the fit settled on.
    """
    d = store_half(blocks, block + Q4_K.d, d)
    dmin = store_half(blocks, block + Q4_K.dmin, dmin)
    pack(blocks, block + Q4_K.scales, fits.scale_codes, fits.minimum_codes, lane)
    for j in range(8):
        scale_code, minimum_code = unpack(blocks, block + Q4_K.scales, j)
        scale, least = d * scale_code, dmin * minimum_code
        for half in range(2):
            x = load(F32x16, values, 256 * number + 32 * j + 16 * half)
            if scale != 0:
                code = clamp(nearest_int((x + least) / scale), 0, limit)
            else:
                code = rint(clamp(fits.inverses[j][lane] * (x - fits.origins[j][lane]), 0, limit))
            q[2 * j + half] = convert(I32x16, code)
