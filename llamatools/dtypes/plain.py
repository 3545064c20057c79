"""Dtypes of one weight per block: IEEE floats, bfloat16, integers.

bfloat16 is the upper half of a float32; it is held as uint16, since numpy has no such type.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .base import Blocks, DType, Floats

PIECE = 1 << 14  # weights that are rounded at a time, so that what lies between stays in the processor's cache


def _decode_f32(blocks: Blocks) -> Floats:
    return blocks.view("<f4")


def _encode_f32(values: Floats, importance: Floats | None = None) -> Blocks:
    return values.astype("<f4", copy=False)


def _decode_f16(blocks: Blocks) -> Floats:
    return np.take(_float16_as_float32(), blocks.view("<u2"), mode="wrap")  # twice as fast as astype


@cache
def _float16_as_float32() -> Floats:
    """(65536,): of every pattern of bits."""
    with np.errstate(invalid="ignore"):  # a signalling NaN, of which numpy warns on arm64
        return np.arange(65536, dtype="<u2").view("<f2").astype("<f4")


def _encode_f16(values: Floats, importance: Floats | None = None) -> Blocks:
    with np.errstate(over="ignore"):  # what overflows becomes infinite; whoever casts counts it
        return values.astype("<f2")


def _decode_bf16(blocks: Blocks) -> Floats:
    bits: Blocks = np.left_shift(blocks, 16, dtype="<u4", casting="unsafe")
    return bits.view("<f4")


def _encode_bf16(values: Floats, importance: Floats | None = None) -> Blocks:
    """Rounds to nearest, ties to even; a NaN stays one and becomes quiet, as in ggml's ggml_compute_fp32_to_bf16."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4").reshape(-1)
    rounded = np.empty(bits.size, "<u2")
    for start in range(0, bits.size, PIECE):
        piece = bits[start : start + PIECE]
        nearest = piece >> 16
        nearest &= 1
        nearest += 0x7FFF
        nearest += piece
        nearest >>= 16
        nan = np.isnan(piece.view("<f4"))
        if nan.any():
            nearest[nan] = piece[nan] >> 16 | 0x40
        rounded[start : start + PIECE] = nearest
    return rounded.reshape(values.shape)


def _decode_f64(blocks: Blocks) -> Floats:
    with np.errstate(over="ignore"):
        return blocks.astype(np.float32)


F32 = DType("F32", 0, np.dtype("<f4"), decode=_decode_f32, encode=_encode_f32)
F16 = DType("F16", 1, np.dtype("<f2"), decode=_decode_f16, encode=_encode_f16)
BF16 = DType("BF16", 30, np.dtype("<u2"), decode=_decode_bf16, encode=_encode_bf16)
F64 = DType("F64", 28, np.dtype("<f8"), decode=_decode_f64)
I8 = DType("I8", 24, np.dtype("i1"))
I16 = DType("I16", 25, np.dtype("<i2"))
I32 = DType("I32", 26, np.dtype("<i4"))
I64 = DType("I64", 27, np.dtype("<i8"))

# Found in torch and safetensors files only: listed by `inspect`, refused as weights.
BOOL = DType("BOOL", None, np.dtype("u1"))
U8 = DType("U8", None, np.dtype("u1"))
U16 = DType("U16", None, np.dtype("<u2"))
U32 = DType("U32", None, np.dtype("<u4"))
U64 = DType("U64", None, np.dtype("<u8"))
F8_E4M3 = DType("F8_E4M3", None, np.dtype("u1"))
F8_E5M2 = DType("F8_E5M2", None, np.dtype("u1"))
F8_E4M3FNUZ = DType("F8_E4M3FNUZ", None, np.dtype("u1"))
F8_E5M2FNUZ = DType("F8_E5M2FNUZ", None, np.dtype("u1"))
F8_E8M0 = DType("F8_E8M0", None, np.dtype("u1"))
C32 = DType("C32", None, np.dtype([("re", "<f2"), ("im", "<f2")]))
C64 = DType("C64", None, np.dtype("<c8"))
C128 = DType("C128", None, np.dtype("<c16"))

TABLE = (
    F32, F16, BF16, F64, I8, I16, I32, I64,
    BOOL, U8, U16, U32, U64, F8_E4M3, F8_E5M2, F8_E4M3FNUZ, F8_E5M2FNUZ, F8_E8M0, C32, C64, C128,
)  # fmt: skip
