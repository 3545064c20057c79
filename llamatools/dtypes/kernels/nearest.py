"""ggml's nearest_int, bit for bit, for any float."""

from __future__ import annotations

from typing import Any

from ..simd import F32x16, I32x16, bitcast, inlined

SHIFT = 12582912.0  # 1.5 * 2^23, where float32 has whole numbers only: adding it rounds, ties to even


@inlined
def nearest_int(x: Any) -> Any:
    """The nearest whole number, ties to even, as a float; exact between -2^22 and 2^22.

    Beyond, C's nearest_int does not saturate: it takes the low 23 bits of x + SHIFT, whatever they mean, so that
    infinities become -2^22 and NaN becomes 0. Blocks with scales beyond float16, or near float32's least, depend on it.
    """
    shifted = bitcast(I32x16, x + SHIFT)
    return bitcast(F32x16, shifted & 0x7FFFFF | 0x4B000000) - SHIFT  # 0x4B000000: the exponent of SHIFT
