"""Blocks of 32 weights to float32, as ggml's dequantize_row_* do: the same bits."""

from __future__ import annotations

from typing import Any

from .. import legacy
from ..base import Floats
from ..simd import F32x16, I8x16, I32x16, U8x16, convert, inlined, kernel, load, load_half, mask_of, select, store
from . import Bytes
from .layouts import offsets
from .rounding import Sums, compare

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = (offsets(dtype) for dtype in legacy.TABLE)


@inlined
def q4_0(blocks: Bytes, block: int, values: Floats, first: int) -> None:
    """d * (q - 8)"""
    d = load_half(blocks, block + Q4_0.d)
    nibbles = load(U8x16, blocks, block + Q4_0.qs)
    store(values, first, d * (convert(F32x16, nibbles & 15) - 8))
    store(values, first + 16, d * (convert(F32x16, nibbles >> 4) - 8))


@kernel
def decode_q4_0(blocks: Bytes, values: Floats) -> None:
    for b in range(blocks.size // Q4_0.nbytes):
        q4_0(blocks, b * Q4_0.nbytes, values, 32 * b)


@kernel
def compare_q4_0(values: Floats, blocks: Bytes, sums: Sums) -> None:
    compare(q4_0, Q4_0.nbytes, 32, values, blocks, sums)


@inlined
def q4_1(blocks: Bytes, block: int, values: Floats, first: int) -> None:
    """d * q + m"""
    d = load_half(blocks, block + Q4_1.d)
    m = load_half(blocks, block + Q4_1.m)
    nibbles = load(U8x16, blocks, block + Q4_1.qs)
    store(values, first, d * convert(F32x16, nibbles & 15) + m)
    store(values, first + 16, d * convert(F32x16, nibbles >> 4) + m)


@kernel
def decode_q4_1(blocks: Bytes, values: Floats) -> None:
    for b in range(blocks.size // Q4_1.nbytes):
        q4_1(blocks, b * Q4_1.nbytes, values, 32 * b)


@kernel
def compare_q4_1(values: Floats, blocks: Bytes, sums: Sums) -> None:
    compare(q4_1, Q4_1.nbytes, 32, values, blocks, sums)


@inlined
def q5_0(blocks: Bytes, block: int, values: Floats, first: int) -> None:
    """d * (q - 16)"""
    d = load_half(blocks, block + Q5_0.d)
    low, high = _five_bits(blocks, block + Q5_0.qs, block + Q5_0.qh)
    store(values, first, d * (low - 16))
    store(values, first + 16, d * (high - 16))


@kernel
def decode_q5_0(blocks: Bytes, values: Floats) -> None:
    for b in range(blocks.size // Q5_0.nbytes):
        q5_0(blocks, b * Q5_0.nbytes, values, 32 * b)


@kernel
def compare_q5_0(values: Floats, blocks: Bytes, sums: Sums) -> None:
    compare(q5_0, Q5_0.nbytes, 32, values, blocks, sums)


@inlined
def q5_1(blocks: Bytes, block: int, values: Floats, first: int) -> None:
    """d * q + m"""
    d = load_half(blocks, block + Q5_1.d)
    m = load_half(blocks, block + Q5_1.m)
    low, high = _five_bits(blocks, block + Q5_1.qs, block + Q5_1.qh)
    store(values, first, d * low + m)
    store(values, first + 16, d * high + m)


@kernel
def decode_q5_1(blocks: Bytes, values: Floats) -> None:
    for b in range(blocks.size // Q5_1.nbytes):
        q5_1(blocks, b * Q5_1.nbytes, values, 32 * b)


@kernel
def compare_q5_1(values: Floats, blocks: Bytes, sums: Sums) -> None:
    compare(q5_1, Q5_1.nbytes, 32, values, blocks, sums)


@inlined
def q8_0(blocks: Bytes, block: int, values: Floats, first: int) -> None:
    """d * q"""
    d = load_half(blocks, block + Q8_0.d)
    store(values, first, d * convert(F32x16, load(I8x16, blocks, block + Q8_0.qs)))
    store(values, first + 16, d * convert(F32x16, load(I8x16, blocks, block + Q8_0.qs + 16)))


@kernel
def decode_q8_0(blocks: Bytes, values: Floats) -> None:
    for b in range(blocks.size // Q8_0.nbytes):
        q8_0(blocks, b * Q8_0.nbytes, values, 32 * b)


@kernel
def compare_q8_0(values: Floats, blocks: Bytes, sums: Sums) -> None:
    compare(q8_0, Q8_0.nbytes, 32, values, blocks, sums)


@inlined
def _five_bits(blocks: Bytes, qs: int, qh: int) -> tuple[Any, Any]:
    """The codes of a block's first and second 16 weights: nibbles at qs, fifth bits at qh."""
    nibbles = load(U8x16, blocks, qs)
    first_fifths = mask_of(blocks[qh] | blocks[qh + 1] << 8)
    second_fifths = mask_of(blocks[qh + 2] | blocks[qh + 3] << 8)
    first = convert(I32x16, nibbles & 15) | select(first_fifths, 16, 0)
    second = convert(I32x16, nibbles >> 4) | select(second_fifths, 16, 0)
    return convert(F32x16, first), convert(F32x16, second)
