"""Float32 to blocks of 32 weights, where the columns' importance is known: the bytes of ggml's quantize_row_*_impl.

Sixteen blocks at a time, one per lane. The error of a weight counts as importance * sqrt(mean square of its row + x^2).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import legacy
from ..base import Floats
from ..simd import (
    LANE,
    F32x16,
    I32x16,
    clamp,
    convert,
    inlined,
    kernel,
    load,
    load_transposed,
    lookup,
    minimum,
    rint,
    scratch,
    splat,
    sqrt,
    store_half,
)
from . import Bytes
from .fit import fit_scale, fit_scale_and_minimum
from .layouts import offsets
from .legacy_encode import store_five_bits, store_nibbles

Q4_0, Q4_1, Q5_0, Q5_1, _ = (offsets(dtype) for dtype in legacy.TABLE)
f32 = np.float32


@kernel
def encode_q4_0_weighted(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * (q - 8), the best of 19 scales."""
    x, w = scratch(F32x16, 32), scratch(F32x16, 32)
    n_blocks = blocks.size // Q4_0.nbytes
    blocks_per_row = importance.size // 32
    for row in range(0, n_blocks // blocks_per_row, 16):
        mean_squares = _mean_squares(values, importance.size, row)
        for group in range(row * blocks_per_row, min(n_blocks, (row + 16) * blocks_per_row), 16):
            _load_group(values, importance, mean_squares, row, group, n_blocks, x, w)
            scale, inverse, counts = fit_scale(x, w, 32, 8)
            for lane in range(min(16, n_blocks - group)):
                block = (group + lane) * Q4_0.nbytes
                store_half(blocks, block + Q4_0.d, scale[lane])
                low, high = _codes(values, 32 * (group + lane), inverse[lane], counts[lane], 8)
                store_nibbles(blocks, block + Q4_0.qs, low, high)


@kernel
def encode_q5_0_weighted(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * (q - 16), the best of 19 scales."""
    x, w = scratch(F32x16, 32), scratch(F32x16, 32)
    n_blocks = blocks.size // Q5_0.nbytes
    blocks_per_row = importance.size // 32
    for row in range(0, n_blocks // blocks_per_row, 16):
        mean_squares = _mean_squares(values, importance.size, row)
        for group in range(row * blocks_per_row, min(n_blocks, (row + 16) * blocks_per_row), 16):
            _load_group(values, importance, mean_squares, row, group, n_blocks, x, w)
            scale, inverse, counts = fit_scale(x, w, 32, 16)
            for lane in range(min(16, n_blocks - group)):
                block = (group + lane) * Q5_0.nbytes
                store_half(blocks, block + Q5_0.d, scale[lane])
                low, high = _codes(values, 32 * (group + lane), inverse[lane], counts[lane], 16)
                store_five_bits(blocks, block + Q5_0.qs, block + Q5_0.qh, low, high)


@kernel
def encode_q4_1_weighted(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * q + m, the best of 38 spans."""
    x, w = scratch(F32x16, 32), scratch(F32x16, 32)
    n_blocks = blocks.size // Q4_1.nbytes
    blocks_per_row = importance.size // 32
    for row in range(0, n_blocks // blocks_per_row, 16):
        mean_squares = _mean_squares(values, importance.size, row)
        for group in range(row * blocks_per_row, min(n_blocks, (row + 16) * blocks_per_row), 16):
            _load_group(values, importance, mean_squares, row, group, n_blocks, x, w)
            scale, least, inverse, origin = fit_scale_and_minimum(x, w, 32, 15, -0.9, 0.05, 36)
            for lane in range(min(16, n_blocks - group)):
                block = (group + lane) * Q4_1.nbytes
                store_half(blocks, block + Q4_1.d, scale[lane])
                store_half(blocks, block + Q4_1.m, least[lane])
                low, high = _codes_above(values, 32 * (group + lane), inverse[lane], origin[lane], 15)
                store_nibbles(blocks, block + Q4_1.qs, low, high)


@kernel
def encode_q5_1_weighted(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * q + m, the best of 38 spans."""
    x, w = scratch(F32x16, 32), scratch(F32x16, 32)
    n_blocks = blocks.size // Q5_1.nbytes
    blocks_per_row = importance.size // 32
    for row in range(0, n_blocks // blocks_per_row, 16):
        mean_squares = _mean_squares(values, importance.size, row)
        for group in range(row * blocks_per_row, min(n_blocks, (row + 16) * blocks_per_row), 16):
            _load_group(values, importance, mean_squares, row, group, n_blocks, x, w)
            scale, least, inverse, origin = fit_scale_and_minimum(x, w, 32, 31, -0.9, 0.05, 36)
            for lane in range(min(16, n_blocks - group)):
                block = (group + lane) * Q5_1.nbytes
                store_half(blocks, block + Q5_1.d, scale[lane])
                store_half(blocks, block + Q5_1.m, least[lane])
                low, high = _codes_above(values, 32 * (group + lane), inverse[lane], origin[lane], 31)
                store_five_bits(blocks, block + Q5_1.qs, block + Q5_1.qh, low, high)


@inlined
def _mean_squares(values: Floats, row_length: int, row: int) -> Any:
    """The mean squares of rows row to row + 15, summed in order, one row per lane; past the end, the last row again."""
    starts = row_length * minimum(LANE + row, values.size // row_length - 1)
    x = scratch(F32x16, 16)
    total = splat(F32x16, 0)
    for column in range(0, row_length, 16):
        load_transposed(values, starts + column, x, 0)
        for k in range(16):
            total = total + x[k] * x[k]
    return total / f32(row_length)


@inlined
def _load_group(
    values: Floats, importance: Floats, mean_squares: Any, row: int, group: int, n_blocks: int, x: Any, w: Any
) -> None:
    """Blocks group to group + 15 into x, and into w what their errors count; past the end, the last block again.

    mean_squares: of rows row to row + 15, from which the blocks are.
    """
    block = minimum(LANE + group, n_blocks - 1)
    blocks_per_row = importance.size // 32
    row_of_block = block // blocks_per_row
    for k in range(0, 32, 16):
        load_transposed(values, 32 * block, x, k)
        load_transposed(importance, 32 * (block - row_of_block * blocks_per_row), w, k)
    mean_square = lookup(mean_squares, convert(I32x16, row_of_block - row))
    for k in range(32):
        w[k] = w[k] * sqrt(mean_square + x[k] * x[k])


@inlined
def _codes(values: Floats, start: int, inverse: Any, counts: Any, limit: int) -> tuple[Any, Any]:
    """The codes that fit_scale settled on for the 32 weights at start, counted from 0; 0 for a negligible block."""
    zero = limit if counts else 0
    first = clamp(rint(load(F32x16, values, start) * inverse), -limit, limit - 1)
    second = clamp(rint(load(F32x16, values, start + 16) * inverse), -limit, limit - 1)
    return convert(I32x16, first) + zero, convert(I32x16, second) + zero


@inlined
def _codes_above(values: Floats, start: int, inverse: Any, origin: Any, limit: int) -> tuple[Any, Any]:
    """The codes that fit_scale_and_minimum settled on for the 32 weights at start."""
    first = clamp(rint((load(F32x16, values, start) - origin) * inverse), 0, limit)
    second = clamp(rint((load(F32x16, values, start + 16) - origin) * inverse), 0, limit)
    return convert(I32x16, first), convert(I32x16, second)
