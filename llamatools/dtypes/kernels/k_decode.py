"""Blocks of 256 weights to float32, as ggml's dequantize_row_q*_K do: the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import k_quants
from ..base import Floats
from ..simd import F32x16, I8x16, U8x16, convert, inlined, kernel, load, load_half, store
from . import Bytes
from .layouts import offsets
from .rounding import Sums, compare
from .six_bit_scales import unpack

Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = (offsets(dtype) for dtype in k_quants.TABLE)
f32 = np.float32


@inlined
def q2_k(blocks: Bytes, block: int, values: Floats, first: int) -> None:
    """d * scale * q - dmin * minimum, per sub-block of 16"""
    d = load_half(blocks, block + Q2_K.d)
    dmin = load_half(blocks, block + Q2_K.dmin)
    for j in range(16):
        code = blocks[block + Q2_K.scales + j]
        scale, least = d * f32(code & 15), dmin * f32(code >> 4)
        q = convert(F32x16, _two_bits(blocks, block + Q2_K.qs, j))
        store(values, first + 16 * j, scale * q - least)


@kernel
def decode_q2_k(blocks: Bytes, values: Floats) -> None:
    for b in range(blocks.size // Q2_K.nbytes):
        q2_k(blocks, b * Q2_K.nbytes, values, 256 * b)


@inlined
def q3_k(blocks: Bytes, block: int, values: Floats, first: int) -> None:
    """d * (scale - 32) * (q - 4), per sub-block of 16; bit j of hmask's byte k is the third bit of weight 32 j + k"""
    d = load_half(blocks, block + Q3_K.d)
    for j in range(16):
        scale = d * (_q3_k_scale(blocks, block + Q3_K.scales, j) - f32(32))
        third = load(U8x16, blocks, block + Q3_K.hmask + 16 * (j % 2)) >> (j // 2) & 1
        q = _two_bits(blocks, block + Q3_K.qs, j) | third << 2
        store(values, first + 16 * j, scale * (convert(F32x16, q) - 4))


@kernel
def decode_q3_k(blocks: Bytes, values: Floats) -> None:
    for b in range(blocks.size // Q3_K.nbytes):
        q3_k(blocks, b * Q3_K.nbytes, values, 256 * b)


@inlined
def _two_bits(blocks: Bytes, qs: int, j: int) -> Any:
    """The low two bits of sub-block j's codes. Of each 128 weights, byte k holds weights k, k + 32, k + 64, k + 96."""
    return load(U8x16, blocks, qs + 32 * (j // 8) + 16 * (j % 2)) >> (2 * (j // 2 % 4)) & 3


@inlined
def _q3_k_scale(blocks: Bytes, packed: int, j: int) -> Any:
    """Scale j of sixteen: four bits in the halves of the first eight bytes, two more in the last four."""
    low = blocks[packed + j % 8] >> (4 * (j // 8)) & 15
    high = blocks[packed + 8 + j % 4] >> (2 * (j // 4)) & 3
    return f32(low | high << 4)


@inlined
def q4_k(blocks: Bytes, block: int, values: Floats, first: int) -> None:
    """d * scale * q - dmin * minimum, per sub-block of 32"""
    d = load_half(blocks, block + Q4_K.d)
    dmin = load_half(blocks, block + Q4_K.dmin)
    for j in range(0, 8, 2):
        low_scale, low_least = _scale_and_minimum(blocks, block + Q4_K.scales, j, d, dmin)
        high_scale, high_least = _scale_and_minimum(blocks, block + Q4_K.scales, j + 1, d, dmin)
        for half in range(0, 32, 16):
            nibbles = load(U8x16, blocks, block + Q4_K.qs + 16 * j + half)
            k = first + 32 * j + half
            store(values, k, low_scale * convert(F32x16, nibbles & 15) - low_least)
            store(values, k + 32, high_scale * convert(F32x16, nibbles >> 4) - high_least)


@kernel
def decode_q4_k(blocks: Bytes, values: Floats) -> None:
    for b in range(blocks.size // Q4_K.nbytes):
        q4_k(blocks, b * Q4_K.nbytes, values, 256 * b)


@kernel
def compare_q4_k(values: Floats, blocks: Bytes, sums: Sums) -> None:
    compare(q4_k, Q4_K.nbytes, 256, values, blocks, sums)


@inlined
def q5_k(blocks: Bytes, block: int, values: Floats, first: int) -> None:
    """d * scale * q - dmin * minimum, per sub-block of 32; bit j of qh's byte k is the fifth bit of weight 32 j + k"""
    d = load_half(blocks, block + Q5_K.d)
    dmin = load_half(blocks, block + Q5_K.dmin)
    for j in range(0, 8, 2):
        low_scale, low_least = _scale_and_minimum(blocks, block + Q5_K.scales, j, d, dmin)
        high_scale, high_least = _scale_and_minimum(blocks, block + Q5_K.scales, j + 1, d, dmin)
        for half in range(0, 32, 16):
            nibbles = load(U8x16, blocks, block + Q5_K.qs + 16 * j + half)
            fifths = load(U8x16, blocks, block + Q5_K.qh + half) >> j
            low = nibbles & 15 | (fifths & 1) << 4
            high = nibbles >> 4 | (fifths & 2) << 3
            k = first + 32 * j + half
            store(values, k, low_scale * convert(F32x16, low) - low_least)
            store(values, k + 32, high_scale * convert(F32x16, high) - high_least)


@kernel
def decode_q5_k(blocks: Bytes, values: Floats) -> None:
    for b in range(blocks.size // Q5_K.nbytes):
        q5_k(blocks, b * Q5_K.nbytes, values, 256 * b)


@kernel
def compare_q5_k(values: Floats, blocks: Bytes, sums: Sums) -> None:
    compare(q5_k, Q5_K.nbytes, 256, values, blocks, sums)


@inlined
def _scale_and_minimum(blocks: Bytes, packed: int, j: int, d: Any, dmin: Any) -> tuple[Any, Any]:
    scale, least = unpack(blocks, packed, j)
    return d * scale, dmin * least


@inlined
def q6_k(blocks: Bytes, block: int, values: Floats, first: int) -> None:
    """d * scale * (q - 32), per sub-block of 16

    Of each 128 weights, ql's 64 bytes hold the low four bits of weights k and k + 64, qh's 32 bytes the high two bits
    of weights k, k + 32, k + 64 and k + 96.
    """
    d = load_half(blocks, block + Q6_K.d)
    scales = d * convert(F32x16, load(I8x16, blocks, block + Q6_K.scales))
    for j in range(16):
        n, quarter, half = j // 8, j // 2 % 4, 16 * (j % 2)
        nibbles = load(U8x16, blocks, block + Q6_K.ql + 64 * n + 32 * (quarter % 2) + half)
        low = nibbles >> (4 * (quarter // 2)) & 15
        high = load(U8x16, blocks, block + Q6_K.qh + 32 * n + half) >> (2 * quarter) & 3
        q = convert(I8x16, low | high << 4) - 32
        store(values, first + 16 * j, scales[j] * convert(F32x16, q))


@kernel
def decode_q6_k(blocks: Bytes, values: Floats) -> None:
    for b in range(blocks.size // Q6_K.nbytes):
        q6_k(blocks, b * Q6_K.nbytes, values, 256 * b)


@kernel
def compare_q6_k(values: Floats, blocks: Bytes, sums: Sums) -> None:
    compare(q6_k, Q6_K.nbytes, 256, values, blocks, sums)
