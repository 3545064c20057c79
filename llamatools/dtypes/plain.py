"""Dtypes of one weight per block: IEEE floats, bfloat16, integers.

bfloat16 is the upper half of a float32; it is held as uint16, since numpy has no such type.
"""

from __future__ import annotations

import numpy as np

from .base import Blocks, DType, Floats


def _decode_f32(blocks: Blocks) -> Floats:
    return blocks.view("<f4")


def _encode_f32(values: Floats, importance: Floats | None = None) -> Blocks:
    return values.astype("<f4", copy=False)


def _decode_f16(blocks: Blocks) -> Floats:
    return blocks.astype(np.float32)


def _encode_f16(values: Floats, importance: Floats | None = None) -> Blocks:
    with np.errstate(over="ignore"):  # what overflows becomes infinite; whoever casts counts it
        return values.astype("<f2")


def _decode_bf16(blocks: Blocks) -> Floats:
    bits = blocks.astype("<u4")
    bits <<= 16
    return bits.view("<f4")


def _encode_bf16(values: Floats, importance: Floats | None = None) -> Blocks:
    """Rounds to nearest, ties to even; a NaN stays one and becomes quiet, as in ggml's ggml_compute_fp32_to_bf16."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        rounded[nan] = bits[nan] | 0x400000
    rounded >>= 16
    return np.asarray(rounded, "<u2")


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
