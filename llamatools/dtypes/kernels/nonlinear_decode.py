"""IQ4_NL, IQ4_XS and MXFP4 to float32, as ggml's dequantize_row_* do: the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import nonlinear
from ..base import Floats
from ..simd import (
    F32x16,
    I32x16,
    U8x16,
    VectorConstant,
    bitcast,
    convert,
    inlined,
    kernel,
    load,
    load_half,
    lookup,
    splat,
    store,
)
from . import Bytes
from .layouts import offsets
from .rounding import Sums, compare

IQ4_NL, IQ4_XS, MXFP4 = (offsets(dtype) for dtype in nonlinear.TABLE)
IQ4_VALUES: Any = VectorConstant(F32x16, nonlinear.IQ4_VALUES)
MXFP4_VALUES: Any = VectorConstant(F32x16, nonlinear.MXFP4_VALUES)
f32 = np.float32


@inlined
def iq4_nl(blocks: Bytes, block: int, values: Floats, first: int) -> None:
    """d * IQ4_VALUES[q]"""
    low, high = _looked_up(IQ4_VALUES, blocks, block + IQ4_NL.qs)
    d = load_half(blocks, block + IQ4_NL.d)
    store(values, first, d * low)
    store(values, first + 16, d * high)


@kernel
def decode_iq4_nl(blocks: Bytes, values: Floats) -> None:
    for b in range(blocks.size // IQ4_NL.nbytes):
        iq4_nl(blocks, b * IQ4_NL.nbytes, values, 32 * b)


@kernel
def compare_iq4_nl(values: Floats, blocks: Bytes, sums: Sums) -> None:
    compare(iq4_nl, IQ4_NL.nbytes, 32, values, blocks, sums)


@inlined
def iq4_xs(blocks: Bytes, block: int, values: Floats, first: int) -> None:
    """d * (scale - 32) * IQ4_VALUES[q], per sub-block of 32"""
    d = load_half(blocks, block + IQ4_XS.d)
    for j in range(8):
        four_bits = blocks[block + IQ4_XS.scales_l + j // 2] >> (4 * (j % 2)) & 15
        two_bits = blocks[block + IQ4_XS.scales_h + j // 4] >> (2 * (j % 4)) & 3
        scale = d * (f32(four_bits | two_bits << 4) - f32(32))
        low, high = _looked_up(IQ4_VALUES, blocks, block + IQ4_XS.qs + 16 * j)
        store(values, first + 32 * j, scale * low)
        store(values, first + 32 * j + 16, scale * high)


@kernel
def decode_iq4_xs(blocks: Bytes, values: Floats) -> None:
    for b in range(blocks.size // IQ4_XS.nbytes):
        iq4_xs(blocks, b * IQ4_XS.nbytes, values, 256 * b)


@kernel
def compare_iq4_xs(values: Floats, blocks: Bytes, sums: Sums) -> None:
    compare(iq4_xs, IQ4_XS.nbytes, 256, values, blocks, sums)


@inlined
def mxfp4(blocks: Bytes, block: int, values: Floats, first: int) -> None:
    """2^(e - 128) * MXFP4_VALUES[q]"""
    d = power_of_two(blocks[block + MXFP4.e])
    low, high = _looked_up(MXFP4_VALUES, blocks, block + MXFP4.qs)
    store(values, first, d * low)
    store(values, first + 16, d * high)


@kernel
def decode_mxfp4(blocks: Bytes, values: Floats) -> None:
    for b in range(blocks.size // MXFP4.nbytes):
        mxfp4(blocks, b * MXFP4.nbytes, values, 32 * b)


@kernel
def compare_mxfp4(values: Floats, blocks: Bytes, sums: Sums) -> None:
    compare(mxfp4, MXFP4.nbytes, 32, values, blocks, sums)


@inlined
def power_of_two(e: Any) -> Any:
    """2^(e - 128) in every lane, for e from 0 to 255; subnormal for e below 2."""
    e = np.int32(e)
    bits = (e - 1) << 23 if e >= 2 else 0x00200000 << e
    return bitcast(F32x16, splat(I32x16, bits))


@inlined
def _looked_up(table: Any, blocks: Bytes, qs: int) -> tuple[Any, Any]:
    """The table's values for the 32 nibbles at qs: those of the low halves, those of the high halves."""
    nibbles = load(U8x16, blocks, qs)
    return lookup(table, convert(I32x16, nibbles & 15)), lookup(table, convert(I32x16, nibbles >> 4))
