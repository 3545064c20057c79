"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: products with activations in blocks of 32 (layouts: llamatools/dtypes/legacy.py)."""

from __future__ import annotations

from typing import Any

import numpy as np

from llamatools.dtypes import legacy
from llamatools.dtypes.kernels.layouts import offsets
from llamatools.dtypes.simd import (
    I8x64,
    U8x16,
    U8x64,
    U16x16,
    bitcast,
    bits_as_bytes,
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
from .tile import accumulate, accumulate_with_minima, tiles_by_tokens

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = (offsets(dtype) for dtype in legacy.TABLE)
NIBBLES = 0x0F0F0F0F


# ---- one token: the codes of four blocks


@inlined
def four_times_sixteen(blocks: Any, p0: int, p1: int, p2: int, p3: int) -> Any:
    low = joined(load(U8x16, blocks, p0), load(U8x16, blocks, p1))
    return joined(low, joined(load(U8x16, blocks, p2), load(U8x16, blocks, p3)))


@inlined
def nibbles(blocks: Any, p0: int, p1: int, p2: int, p3: int) -> tuple[Any, Any]:
    """Of four times sixteen bytes the lower halves, and the upper halves."""
    both = four_times_sixteen(blocks, p0, p1, p2, p3)
    return both & 15, both >> 4


@inlined
def _with_fifths(codes: tuple[Any, Any], blocks: Any, p0: int, p1: int, p2: int, p3: int) -> tuple[Any, Any]:
    """Codes with their fifth bits, which lie at p0 to p3: two bytes of a block's first half, two of its second."""
    first = _four_times_two(blocks, p0, p1, p2, p3)
    second = _four_times_two(blocks, p0 + 2, p1 + 2, p2 + 2, p3 + 2)
    return codes[0] | bits_as_bytes(first) << 4, codes[1] | bits_as_bytes(second) << 4


@inlined
def _four_times_two(blocks: Any, p0: int, p1: int, p2: int, p3: int) -> Any:
    low = _two_bytes(blocks, p0) | _two_bytes(blocks, p1) << np.uint64(16)
    return low | _two_bytes(blocks, p2) << np.uint64(32) | _two_bytes(blocks, p3) << np.uint64(48)


@inlined
def _two_bytes(blocks: Any, p: int) -> Any:
    return np.uint64(blocks[p]) | np.uint64(blocks[p + 1]) << np.uint64(8)


@inlined
def _q4_0(blocks: Any, p0: int, p1: int, p2: int, p3: int) -> tuple[Any, Any]:
    return nibbles(blocks, p0 + Q4_0.qs, p1 + Q4_0.qs, p2 + Q4_0.qs, p3 + Q4_0.qs)


@inlined
def _q4_1(blocks: Any, p0: int, p1: int, p2: int, p3: int) -> tuple[Any, Any]:
    return nibbles(blocks, p0 + Q4_1.qs, p1 + Q4_1.qs, p2 + Q4_1.qs, p3 + Q4_1.qs)


@inlined
def _q5_0(blocks: Any, p0: int, p1: int, p2: int, p3: int) -> tuple[Any, Any]:
    codes = nibbles(blocks, p0 + Q5_0.qs, p1 + Q5_0.qs, p2 + Q5_0.qs, p3 + Q5_0.qs)
    return _with_fifths(codes, blocks, p0 + Q5_0.qh, p1 + Q5_0.qh, p2 + Q5_0.qh, p3 + Q5_0.qh)


@inlined
def _q5_1(blocks: Any, p0: int, p1: int, p2: int, p3: int) -> tuple[Any, Any]:
    codes = nibbles(blocks, p0 + Q5_1.qs, p1 + Q5_1.qs, p2 + Q5_1.qs, p3 + Q5_1.qs)
    return _with_fifths(codes, blocks, p0 + Q5_1.qh, p1 + Q5_1.qh, p2 + Q5_1.qh, p3 + Q5_1.qh)


@inlined
def _q8_0(blocks: Any, p0: int, p1: int, p2: int, p3: int) -> tuple[Any, Any]:
    first = four_times_sixteen(blocks, p0 + Q8_0.qs, p1 + Q8_0.qs, p2 + Q8_0.qs, p3 + Q8_0.qs)
    second = four_times_sixteen(blocks, p0 + Q8_0.qs + 16, p1 + Q8_0.qs + 16, p2 + Q8_0.qs + 16, p3 + Q8_0.qs + 16)
    return bitcast(I8x64, first), bitcast(I8x64, second)


@kernel
def q4_0_by_vector(job: int, start: int, stop: int) -> None:
    rows_by_vector(job, start, stop, _q4_0, Q4_0.nbytes, 8, 15, False)


@kernel
def q4_1_by_vector(job: int, start: int, stop: int) -> None:
    rows_by_vector(job, start, stop, _q4_1, Q4_1.nbytes, 0, 15, True)


@kernel
def q5_0_by_vector(job: int, start: int, stop: int) -> None:
    rows_by_vector(job, start, stop, _q5_0, Q5_0.nbytes, 16, 31, False)


@kernel
def q5_1_by_vector(job: int, start: int, stop: int) -> None:
    rows_by_vector(job, start, stop, _q5_1, Q5_1.nbytes, 0, 31, True)


@kernel
def q8_0_by_vector(job: int, start: int, stop: int) -> None:
    rows_by_vector(job, start, stop, _q8_0, Q8_0.nbytes, 0, 127, False)


# ---- many tokens: sixteen rows taken apart


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
def _unpack_with_fifths(
    blocks: Any, starts: Any, offset: int, fifths: Any, columns: Any, codes: Any, first: int
) -> None:
    """As unpack_nibbles; bit k of `fifths`, a U32x16, is the fifth bit of code k."""
    load_columns(blocks, starts, offset, columns, 0)
    for c in range(4):
        low, high = columns[c] & NIBBLES, columns[c] >> 4 & NIBBLES
        codes[first + c] = bitcast(U8x64, low | _four_bytes(fifths >> (4 * c) & 15) << 4)
        codes[first + 4 + c] = bitcast(U8x64, high | _four_bytes(fifths >> (4 * c + 16) & 15) << 4)


@inlined
def _four_bytes(bits: Any) -> Any:
    """The low four bits of each lane, one in each of its bytes."""
    return bits * 0x00204081 & 0x01010101


@inlined
def _unpack_q4_0(blocks: Any, starts: Any, n: int, columns: Any, codes: Any, scales: Any, minima: Any) -> None:
    for i in range(n):
        load_columns(blocks, starts, i * Q4_0.nbytes, columns, 0)
        scales[i] = low_halves(columns[0])
        unpack_nibbles(blocks, starts, i * Q4_0.nbytes + Q4_0.qs, columns, codes, 8 * i)


@inlined
def _unpack_q4_1(blocks: Any, starts: Any, n: int, columns: Any, codes: Any, scales: Any, minima: Any) -> None:
    for i in range(n):
        load_columns(blocks, starts, i * Q4_1.nbytes, columns, 0)
        scales[i], minima[i] = low_halves(columns[0]), low_halves(columns[0] >> 16)
        unpack_nibbles(blocks, starts, i * Q4_1.nbytes + Q4_1.qs, columns, codes, 8 * i)


@inlined
def _unpack_q5_0(blocks: Any, starts: Any, n: int, columns: Any, codes: Any, scales: Any, minima: Any) -> None:
    for i in range(n):
        load_columns(blocks, starts, i * Q5_0.nbytes, columns, 0)
        scales[i] = low_halves(columns[0])
        fifths = columns[0] >> 16 | columns[1] << 16
        _unpack_with_fifths(blocks, starts, i * Q5_0.nbytes + Q5_0.qs, fifths, columns, codes, 8 * i)


@inlined
def _unpack_q5_1(blocks: Any, starts: Any, n: int, columns: Any, codes: Any, scales: Any, minima: Any) -> None:
    for i in range(n):
        load_columns(blocks, starts, i * Q5_1.nbytes, columns, 0)
        scales[i], minima[i] = low_halves(columns[0]), low_halves(columns[0] >> 16)
        fifths = columns[1]
        _unpack_with_fifths(blocks, starts, i * Q5_1.nbytes + Q5_1.qs, fifths, columns, codes, 8 * i)


@inlined
def _unpack_q8_0(blocks: Any, starts: Any, n: int, columns: Any, codes: Any, scales: Any, minima: Any) -> None:
    for i in range(n):
        load_columns(blocks, starts, i * Q8_0.nbytes, columns, 0)
        scales[i] = low_halves(columns[0])
        load_columns(blocks, starts, i * Q8_0.nbytes + Q8_0.qs, columns, 0)
        load_columns(blocks, starts, i * Q8_0.nbytes + Q8_0.qs + 16, columns, 4)
        for c in range(8):
            codes[8 * i + c] = bitcast(I8x64, columns[c])


@inlined
def _accumulate_q4_0(
    codes: Any, scales: Any, minima: Any, n: int, fields: Any, b: int, first: int, n_tokens: int, totals: Any
) -> None:
    accumulate(codes, scales, 8, 15, n, fields, b, first, n_tokens, totals)


@inlined
def _accumulate_q4_1(
    codes: Any, scales: Any, minima: Any, n: int, fields: Any, b: int, first: int, n_tokens: int, totals: Any
) -> None:
    accumulate_with_minima(codes, scales, minima, 15, n, fields, b, first, n_tokens, totals)


@inlined
def _accumulate_q5_0(
    codes: Any, scales: Any, minima: Any, n: int, fields: Any, b: int, first: int, n_tokens: int, totals: Any
) -> None:
    accumulate(codes, scales, 16, 31, n, fields, b, first, n_tokens, totals)


@inlined
def _accumulate_q5_1(
    codes: Any, scales: Any, minima: Any, n: int, fields: Any, b: int, first: int, n_tokens: int, totals: Any
) -> None:
    accumulate_with_minima(codes, scales, minima, 31, n, fields, b, first, n_tokens, totals)


@inlined
def _accumulate_q8_0(
    codes: Any, scales: Any, minima: Any, n: int, fields: Any, b: int, first: int, n_tokens: int, totals: Any
) -> None:
    accumulate(codes, scales, 0, 127, n, fields, b, first, n_tokens, totals)


@kernel
def q4_0_by_tokens(job: int, start: int, stop: int) -> None:
    codes = scratch(U8x64, 64)
    tiles_by_tokens(job, start, stop, _unpack_q4_0, _accumulate_q4_0, codes, Q4_0.nbytes, 1)


@kernel
def q4_1_by_tokens(job: int, start: int, stop: int) -> None:
    codes = scratch(U8x64, 64)
    tiles_by_tokens(job, start, stop, _unpack_q4_1, _accumulate_q4_1, codes, Q4_1.nbytes, 1)


@kernel
def q5_0_by_tokens(job: int, start: int, stop: int) -> None:
    codes = scratch(U8x64, 64)
    tiles_by_tokens(job, start, stop, _unpack_q5_0, _accumulate_q5_0, codes, Q5_0.nbytes, 1)


@kernel
def q5_1_by_tokens(job: int, start: int, stop: int) -> None:
    codes = scratch(U8x64, 64)
    tiles_by_tokens(job, start, stop, _unpack_q5_1, _accumulate_q5_1, codes, Q5_1.nbytes, 1)


@kernel
def q8_0_by_tokens(job: int, start: int, stop: int) -> None:
    codes = scratch(I8x64, 64)
    tiles_by_tokens(job, start, stop, _unpack_q8_0, _accumulate_q8_0, codes, Q8_0.nbytes, 1)
