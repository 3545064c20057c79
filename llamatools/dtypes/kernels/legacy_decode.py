"""Blocks of 32 weights to float32, as ggml's dequantize_row_* do: the same bits."""

from __future__ import annotations

from typing import Any

from .. import legacy
from ..base import Floats
from ..simd import F32x16, I8x16, I32x16, U8x16, convert, inlined, kernel, load, load_half, mask_of, select, store
from . import Bytes
from .layouts import offsets

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = (offsets(dtype) for dtype in legacy.TABLE)


@kernel
def decode_q4_0(blocks: Bytes, values: Floats) -> None:
    """d * (q - 8)"""
    for b in range(blocks.size // Q4_0.nbytes):
        block = b * Q4_0.nbytes
        d = load_half(blocks, block + Q4_0.d)
        nibbles = load(U8x16, blocks, block + Q4_0.qs)
        store(values, 32 * b, d * (convert(F32x16, nibbles & 15) - 8))
        store(values, 32 * b + 16, d * (convert(F32x16, nibbles >> 4) - 8))


@kernel
def decode_q4_1(blocks: Bytes, values: Floats) -> None:
    """d * q + m"""
    for b in range(blocks.size // Q4_1.nbytes):
        block = b * Q4_1.nbytes
        d = load_half(blocks, block + Q4_1.d)
        m = load_half(blocks, block + Q4_1.m)
        nibbles = load(U8x16, blocks, block + Q4_1.qs)
        store(values, 32 * b, d * convert(F32x16, nibbles & 15) + m)
        store(values, 32 * b + 16, d * convert(F32x16, nibbles >> 4) + m)


@kernel
def decode_q5_0(blocks: Bytes, values: Floats) -> None:
    """d * (q - 16)"""
    for b in range(blocks.size // Q5_0.nbytes):
        block = b * Q5_0.nbytes
        d = load_half(blocks, block + Q5_0.d)
        first, second = _five_bits(blocks, block + Q5_0.qs, block + Q5_0.qh)
        store(values, 32 * b, d * (first - 16))
        store(values, 32 * b + 16, d * (second - 16))


@kernel
def decode_q5_1(blocks: Bytes, values: Floats) -> None:
    """d * q + m"""
    for b in range(blocks.size // Q5_1.nbytes):
        block = b * Q5_1.nbytes
        d = load_half(blocks, block + Q5_1.d)
        m = load_half(blocks, block + Q5_1.m)
        first, second = _five_bits(blocks, block + Q5_1.qs, block + Q5_1.qh)
        store(values, 32 * b, d * first + m)
        store(values, 32 * b + 16, d * second + m)


@kernel
def decode_q8_0(blocks: Bytes, values: Floats) -> None:
    """d * q"""
    for b in range(blocks.size // Q8_0.nbytes):
        block = b * Q8_0.nbytes
        d = load_half(blocks, block + Q8_0.d)
        store(values, 32 * b, d * convert(F32x16, load(I8x16, blocks, block + Q8_0.qs)))
        store(values, 32 * b + 16, d * convert(F32x16, load(I8x16, blocks, block + Q8_0.qs + 16)))


@inlined
def _five_bits(blocks: Bytes, qs: int, qh: int) -> tuple[Any, Any]:
    """The codes of a block's first and second 16 weights: nibbles at qs, fifth bits at qh."""
    nibbles = load(U8x16, blocks, qs)
    first_fifths = mask_of(blocks[qh] | blocks[qh + 1] << 8)
    second_fifths = mask_of(blocks[qh + 2] | blocks[qh + 3] << 8)
    first = convert(I32x16, nibbles & 15) | select(first_fifths, 16, 0)
    second = convert(I32x16, nibbles >> 4) | select(second_fifths, 16, 0)
    return convert(F32x16, first), convert(F32x16, second)
