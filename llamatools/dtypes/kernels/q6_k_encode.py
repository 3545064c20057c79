"""Float32 to Q6_K: the bytes of ggml's quantize_row_q6_K_ref and, with importance, quantize_row_q6_K_impl.

One block at a time, with a lane for each of its sixteen sub-blocks, which are fitted on their own, x ~ scale * q; the
scales are then coded in eight bits, and the weights coded anew with what those mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import k_quants
from ..base import Floats
from ..simd import (
    LANE,
    F32x16,
    I8x16,
    I32x16,
    U8x16,
    clamp,
    convert,
    inlined,
    kernel,
    load,
    load_transposed,
    minimum,
    scratch,
    splat,
    store,
    store_half,
)
from . import Bytes
from .fit import NEGLIGIBLE, fit_scale
from .layouts import offsets
from .legacy_encode import store_nibbles
from .nearest import nearest_int

Q6_K = offsets(k_quants.Q6_K)
f32 = np.float32


@kernel
def encode_q6_k(values: Floats, blocks: Bytes) -> None:
    """x ~ d * scale * (q - 32), the best of 19 scales per sub-block; the error of x counts as x^2."""
    x, w = scratch(F32x16, 16), scratch(F32x16, 16)
    for b in range(blocks.size // Q6_K.nbytes):
        load_transposed(values, 256 * b + 16 * LANE, x, 0)
        for k in range(16):
            w[k] = x[k] * x[k]
        _encode_block(values, b, x, w, blocks)


@kernel
def encode_q6_k_weighted(values: Floats, importance: Floats, blocks: Bytes) -> None:
    """x ~ d * scale * (q - 32), the best of 19 scales per sub-block; the error of x counts as its importance."""
    x, w = scratch(F32x16, 16), scratch(F32x16, 16)
    blocks_per_row = importance.size // 256
    for b in range(blocks.size // Q6_K.nbytes):
        load_transposed(values, 256 * b + 16 * LANE, x, 0)
        load_transposed(importance, 256 * (b % blocks_per_row) + 16 * LANE, w, 0)
        _encode_block(values, b, x, w, blocks)


@inlined
def _encode_block(values: Floats, b: int, x: Any, w: Any, blocks: Bytes) -> None:
    """Block b of values, which is in x, one sub-block per lane, as are its errors' weights in w."""
    block = b * Q6_K.nbytes
    scales, inverses, counts = fit_scale(x, w, 16, 32)
    largest = _largest(scales)
    if abs(largest) < NEGLIGIBLE:
        for k in range(Q6_K.nbytes):
            blocks[block + k] = 0
        return
    inverse = f32(-128) / largest
    d = store_half(blocks, block + Q6_K.d, f32(1) / inverse)
    codes = convert(I8x16, convert(I32x16, minimum(nearest_int(inverse * scales), 127)))
    store(blocks, block + Q6_K.scales, codes)
    store_codes(values, b, d * convert(F32x16, codes), inverses, counts, blocks)


@inlined
def store_codes(values: Floats, b: int, scales: Any, inverses: Any, counts: Any, blocks: Bytes) -> None:
    """Codes the weights of block b. scales: what its sub-blocks, one per lane, have; inverses, counts: see _codes."""
    block = b * Q6_K.nbytes
    for j in range(0, 16, 8):
        for k in range(2):
            q0 = _codes(values, 256 * b, j + k, scales, inverses, counts)
            q1 = _codes(values, 256 * b, j + k + 2, scales, inverses, counts)
            q2 = _codes(values, 256 * b, j + k + 4, scales, inverses, counts)
            q3 = _codes(values, 256 * b, j + k + 6, scales, inverses, counts)
            store_nibbles(blocks, block + Q6_K.ql + 8 * j + 16 * k, q0 & 15, q2 & 15)
            store_nibbles(blocks, block + Q6_K.ql + 8 * j + 16 * k + 32, q1 & 15, q3 & 15)
            high = q0 >> 4 | q1 >> 4 << 2 | q2 >> 4 << 4 | q3 >> 4 << 6
            store(blocks, block + Q6_K.qh + 4 * j + 16 * k, convert(U8x16, high))


@inlined
def _codes(values: Floats, start: int, j: int, scales: Any, inverses: Any, counts: Any) -> Any:
    """Codes 0 .. 63 of sub-block j of the block at start: with its scale, or with its fit where that became 0.

    A negligible sub-block has codes 0, not 32, as in ggml.
    """
    x = load(F32x16, values, start + 16 * j)
    if scales[j] != 0:
        q = nearest_int(x / scales[j])
    elif counts[j]:
        q = nearest_int(x * inverses[j])
    else:
        q = splat(F32x16, -32)
    return convert(I32x16, clamp(q, -32, 31)) + 32


@inlined
def _largest(scales: Any) -> Any:
    """The scale of largest magnitude, the first of equals; 0 where there is none."""
    largest = f32(0)
    for j in range(16):
        if abs(scales[j]) > abs(largest):
            largest = scales[j]
    return largest
