"""F32, F16, BF16: rows by one token's float32 activations."""

from __future__ import annotations

from typing import Any

import numpy as np

from llamatools.dtypes.simd import (
    F32x16,
    I64x16,
    U16x16,
    U32x16,
    array_at,
    bitcast,
    convert,
    half_to_float,
    inlined,
    kernel,
    load,
    load_half,
    prefetch,
    reduce_add,
    splat,
)

from .job import BLOCKS, N_IN, X, Y
from .rows import AHEAD


@inlined
def _rows(job: int, start: int, stop: int, weights: Any, sixteen: Any, one: Any) -> None:
    """Rows of single weights. sixteen(weights, i), one(weights, i): those from the i-th on, as float32."""
    fields = array_at(I64x16, job)
    x, y, n_in = array_at(F32x16, fields[X]), array_at(F32x16, fields[Y]), fields[N_IN]
    for row in range(start, stop):
        first = row * n_in
        total0 = splat(F32x16, 0)
        total1 = total0
        i = 0
        while i + 32 <= n_in:
            prefetch(weights, first + i + AHEAD // 2)
            total0 = total0 + sixteen(weights, first + i) * load(F32x16, x, i)
            total1 = total1 + sixteen(weights, first + i + 16) * load(F32x16, x, i + 16)
            i += 32
        total = reduce_add(total0 + total1)
        while i < n_in:
            total += one(weights, first + i) * x[i]
            i += 1
        y[row] = total


@inlined
def _sixteen_f32(weights: Any, i: int) -> Any:
    return load(F32x16, weights, i)


@inlined
def _one_f32(weights: Any, i: int) -> Any:
    return weights[i]


@inlined
def _sixteen_f16(weights: Any, i: int) -> Any:
    return half_to_float(load(U16x16, weights, i))


@inlined
def _one_f16(weights: Any, i: int) -> Any:
    return load_half(weights, i)


@inlined
def _sixteen_bf16(weights: Any, i: int) -> Any:
    return bitcast(F32x16, convert(U32x16, load(U16x16, weights, i)) << 16)


@inlined
def _one_bf16(weights: Any, i: int) -> Any:
    return bitcast(F32x16, splat(U32x16, np.uint32(weights[i]) << np.uint32(16)))[0]


@kernel
def f32_by_vector(job: int, start: int, stop: int) -> None:
    _rows(job, start, stop, array_at(F32x16, array_at(I64x16, job)[BLOCKS]), _sixteen_f32, _one_f32)


@kernel
def f16_by_vector(job: int, start: int, stop: int) -> None:
    _rows(job, start, stop, array_at(U16x16, array_at(I64x16, job)[BLOCKS]), _sixteen_f16, _one_f16)


@kernel
def bf16_by_vector(job: int, start: int, stop: int) -> None:
    _rows(job, start, stop, array_at(U16x16, array_at(I64x16, job)[BLOCKS]), _sixteen_bf16, _one_bf16)
