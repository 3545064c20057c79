"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: products with activations in blocks of 32 (layouts: llamatools/dtypes/legacy.py)."""

from __future__ import annotations

from typing import Any

from llamatools.dtypes import legacy
from llamatools.dtypes.kernels.layouts import offsets
from llamatools.dtypes.simd import (
    U8x16,
    U8x64,
    U16x16,
    bitcast,
    convert,
    half_to_float,
    inlined,
    joined,
    kernel,
    load,
    load_columns,
    scratch,
)

from .rows import rows_by_vector
from .tile import accumulate, tiles_by_tokens

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = (offsets(dtype) for dtype in legacy.TABLE)


@inlined
def nibbles(blocks: Any, p0: int, p1: int, p2: int, p3: int) -> Any:
    """Of four times 16 bytes the lower halves, and the upper halves."""
    low = joined(load(U8x16, blocks, p0), load(U8x16, blocks, p1))
    high = joined(load(U8x16, blocks, p2), load(U8x16, blocks, p3))
    both = joined(low, high)
    return both & 15, both >> 4


@inlined
def _q4_0(blocks: Any, p0: int, p1: int, p2: int, p3: int) -> Any:
    return nibbles(blocks, p0 + Q4_0.qs, p1 + Q4_0.qs, p2 + Q4_0.qs, p3 + Q4_0.qs)


@kernel
def q4_0_by_vector(job: int, start: int, stop: int) -> None:
    rows_by_vector(job, start, stop, _q4_0, Q4_0.nbytes, 8, 15, False)


@inlined
def low_halves(column: Any) -> Any:
    """The float16 in the lower two bytes of each lane."""
    return half_to_float(convert(U16x16, column))


@inlined
def unpack_nibbles(blocks: Any, starts: Any, offset: int, columns: Any, codes: Any, first: int) -> None:
    """Sixteen bytes of each row, as eight vectors of codes from codes[first] on."""
    load_columns(blocks, starts, offset, columns, 0)
    for c in range(4):
        both = bitcast(U8x64, columns[c])
        codes[first + c] = both & 15
        codes[first + 4 + c] = both >> 4


@inlined
def _unpack_q4_0(blocks: Any, starts: Any, n: int, columns: Any, codes: Any, scales: Any, minima: Any) -> None:
    for i in range(n):
        load_columns(blocks, starts, i * Q4_0.nbytes, columns, 0)
        scales[i] = low_halves(columns[0])
        unpack_nibbles(blocks, starts, i * Q4_0.nbytes + Q4_0.qs, columns, codes, 8 * i)


@inlined
def _accumulate_q4_0(
    codes: Any, scales: Any, minima: Any, n: int, fields: Any, b: int, first: int, n_tokens: int, totals: Any
) -> None:
    accumulate(codes, scales, 8, 15, n, fields, b, first, n_tokens, totals)


@kernel
def q4_0_by_tokens(job: int, start: int, stop: int) -> None:
    codes = scratch(U8x64, 64)
    tiles_by_tokens(job, start, stop, _unpack_q4_0, _accumulate_q4_0, codes, Q4_0.nbytes, 1)
