"""Q4_K, Q5_K, Q6_K: products with activations in blocks of 256 (layouts: llamatools/dtypes/k_quants.py).

Scales within a block are whole numbers, and so is the whole of a block's product but for one factor.
"""

from __future__ import annotations

from typing import Any

from llamatools.dtypes import k_quants
from llamatools.dtypes.kernels.layouts import offsets
from llamatools.dtypes.simd import (
    F32x16,
    I8x16,
    I8x64,
    I32x16,
    I64x16,
    U8x16,
    U8x32,
    U8x64,
    U32x4,
    array_at,
    bitcast,
    bytes_twice,
    convert,
    dot,
    inlined,
    joined,
    kernel,
    load,
    load_columns,
    load_half,
    prefetch,
    reduce_add,
    scratch,
    splat,
    spread,
)

from .job import BLOCKS, CODES, N_IN, PARTIAL_SUMS, SCALES, Y
from .legacy import low_halves
from .rows import AHEAD
from .tile import accumulate_by_sixteen, accumulate_with_minima, tiles_by_tokens

_, _, Q4_K, Q5_K, Q6_K = (offsets(dtype) for dtype in k_quants.TABLE)


# ---- one token


@inlined
def _rows_with_minima(job: int, start: int, stop: int, codes_of: Any, nbytes: int) -> None:
    """Rows of Q4_K or Q5_K. codes_of(blocks, p, c): codes 64 c to 64 c + 63 of the block at p."""
    fields = array_at(I64x16, job)
    blocks, y, n_blocks = array_at(U8x16, fields[BLOCKS]), array_at(F32x16, fields[Y]), fields[N_IN] // 256
    d, sums = array_at(F32x16, fields[SCALES]), array_at(I32x16, fields[PARTIAL_SUMS])
    for row in range(start, stop):
        total = splat(F32x16, 0)
        for b in range(n_blocks):
            p = (row * n_blocks + b) * nbytes
            for line in range(0, nbytes, 64):
                prefetch(blocks, p + AHEAD + line)
            scales, minima = _scales_and_minima(blocks, p)
            product = scaled(fields, codes_of(blocks, p, 0), b, scales, 0)
            product = product + scaled(fields, codes_of(blocks, p, 1), b, scales, 1)
            product = product + scaled(fields, codes_of(blocks, p, 2), b, scales, 2)
            product = product + scaled(fields, codes_of(blocks, p, 3), b, scales, 3)
            least = minima * load(I32x16, sums, 16 * b)
            total = total + convert(F32x16, product) * (load_half(blocks, p) * d[8 * b])
            total = total - convert(F32x16, least) * (load_half(blocks, p + 2) * d[8 * b])
        y[row] = reduce_add(total)


@inlined
def _scales_and_minima(blocks: Any, p: int) -> tuple[Any, Any]:
    """Of every sixteen weights, as whole numbers; six_bit_scales.py says how they are packed."""
    header = load(U32x4, blocks, p)
    a, b, c = header[1], header[2], header[3]
    upper = 0x30303030
    scales = bytes_twice(a & 0x3F3F3F3F, (c & 0x0F0F0F0F) | (a >> 2 & upper))
    minima = bytes_twice(b & 0x3F3F3F3F, (c >> 4 & 0x0F0F0F0F) | (b >> 2 & upper))
    return scales, minima


@inlined
def scaled(fields: Any, codes: Any, b: int, scales: Any, c: int) -> Any:
    """The products of codes 64 c to 64 c + 63 of block b, times their scales."""
    x = load(I8x64, array_at(I8x64, fields[CODES]), 256 * b + 64 * c)
    return dot(codes, x) * spread(scales, c)


@inlined
def _q4_k(blocks: Any, p: int, c: int) -> Any:
    both = load(U8x32, blocks, p + Q4_K.qs + 32 * c)
    return joined(both & 15, both >> 4)


@inlined
def _q5_k(blocks: Any, p: int, c: int) -> Any:
    both, fifths = load(U8x32, blocks, p + Q5_K.qs + 32 * c), load(U8x32, blocks, p + Q5_K.qh) >> (2 * c)
    return joined(both & 15 | (fifths & 1) << 4, both >> 4 | (fifths & 2) << 3)


@inlined
def _q6_k(blocks: Any, p: int, c: int) -> Any:
    """Codes 64 c to 64 c + 63: halves of 64 bytes of ql, and two bits each of 32 bytes of qh."""
    low = load(U8x64, blocks, p + Q6_K.ql + 64 * (c // 2)) >> (4 * (c % 2)) & 15
    high = load(U8x32, blocks, p + Q6_K.qh + 32 * (c // 2)) >> (4 * (c % 2))
    return low | joined(high & 3, high >> 2 & 3) << 4


@kernel
def q4_k_by_vector(job: int, start: int, stop: int) -> None:
    _rows_with_minima(job, start, stop, _q4_k, Q4_K.nbytes)


@kernel
def q5_k_by_vector(job: int, start: int, stop: int) -> None:
    _rows_with_minima(job, start, stop, _q5_k, Q5_K.nbytes)


@kernel
def q6_k_by_vector(job: int, start: int, stop: int) -> None:
    fields = array_at(I64x16, job)
    blocks, y, n_blocks = array_at(U8x16, fields[BLOCKS]), array_at(F32x16, fields[Y]), fields[N_IN] // 256
    d, sums = array_at(F32x16, fields[SCALES]), array_at(I32x16, fields[PARTIAL_SUMS])
    for row in range(start, stop):
        total = splat(F32x16, 0)
        for b in range(n_blocks):
            p = (row * n_blocks + b) * Q6_K.nbytes
            for line in range(0, Q6_K.nbytes, 64):
                prefetch(blocks, p + AHEAD + line)
            scales = convert(I32x16, load(I8x16, blocks, p + Q6_K.scales))
            product = -32 * (scales * load(I32x16, sums, 16 * b))
            product = product + scaled(fields, _q6_k(blocks, p, 0), b, scales, 0)
            product = product + scaled(fields, _q6_k(blocks, p, 1), b, scales, 1)
            product = product + scaled(fields, _q6_k(blocks, p, 2), b, scales, 2)
            product = product + scaled(fields, _q6_k(blocks, p, 3), b, scales, 3)
            total = total + convert(F32x16, product) * (load_half(blocks, p + Q6_K.d) * d[8 * b])
        y[row] = reduce_add(total)


# ---- many tokens


@inlined
def _unpack_header(blocks: Any, starts: Any, columns: Any, scales: Any, minima: Any) -> None:
    """d, dmin and the twelve bytes of scales and minima, with which Q4_K and Q5_K begin. Minima are subtracted."""
    load_columns(blocks, starts, 0, columns, 0)
    d, dmin = low_halves(columns[0]), -low_halves(columns[0] >> 16)
    for j in range(4):
        scales[j] = d * _whole(columns[1] >> (8 * j) & 63)
        minima[j] = dmin * _whole(columns[2] >> (8 * j) & 63)
        halves = columns[3] >> (8 * j)
        scales[4 + j] = d * _whole(halves & 15 | (columns[1] >> (8 * j + 6) & 3) << 4)
        minima[4 + j] = dmin * _whole(halves >> 4 & 15 | (columns[2] >> (8 * j + 6) & 3) << 4)


@inlined
def _whole(numbers: Any) -> Any:
    return convert(F32x16, bitcast(I32x16, numbers))


@inlined
def _unpack_q4_k(blocks: Any, starts: Any, n: int, columns: Any, codes: Any, scales: Any, minima: Any) -> None:
    _unpack_header(blocks, starts, columns, scales, minima)
    for c in range(4):
        load_columns(blocks, starts, Q4_K.qs + 32 * c, columns, 0)
        load_columns(blocks, starts, Q4_K.qs + 32 * c + 16, columns, 4)
        for k in range(8):
            both = bitcast(U8x64, columns[k])
            codes[16 * c + k] = both & 15
            codes[16 * c + 8 + k] = both >> 4


@inlined
def _unpack_q5_k(blocks: Any, starts: Any, n: int, columns: Any, codes: Any, scales: Any, minima: Any) -> None:
    _unpack_header(blocks, starts, columns, scales, minima)
    load_columns(blocks, starts, Q5_K.qh, columns, 8)
    load_columns(blocks, starts, Q5_K.qh + 16, columns, 12)
    for c in range(4):
        load_columns(blocks, starts, Q5_K.qs + 32 * c, columns, 0)
        load_columns(blocks, starts, Q5_K.qs + 32 * c + 16, columns, 4)
        for k in range(8):
            both, fifths = columns[k], columns[8 + k] >> (2 * c)
            codes[16 * c + k] = bitcast(U8x64, both & 0x0F0F0F0F | (fifths & 0x01010101) << 4)
            codes[16 * c + 8 + k] = bitcast(U8x64, both >> 4 & 0x0F0F0F0F | (fifths & 0x02020202) << 3)


@inlined
def _unpack_q6_k(blocks: Any, starts: Any, n: int, columns: Any, codes: Any, scales: Any, minima: Any) -> None:
    load_columns(blocks, starts, Q6_K.nbytes - 16, columns, 0)
    d = low_halves(columns[3] >> 16)
    load_columns(blocks, starts, Q6_K.scales, columns, 0)
    for j in range(16):
        scales[j] = d * convert(F32x16, bitcast(I32x16, columns[j // 4] << (24 - 8 * (j % 4))) >> 24)
    for half in range(2):
        for k in range(0, 16, 4):
            load_columns(blocks, starts, Q6_K.ql + 64 * half + 4 * k, columns, k)
        load_columns(blocks, starts, Q6_K.qh + 32 * half, columns, 16)
        load_columns(blocks, starts, Q6_K.qh + 32 * half + 16, columns, 20)
        for k in range(8):
            high = columns[16 + k]
            for g in range(4):  # of every 128 weights, 32 at a time
                low = columns[k + 8 * (g % 2)] >> (4 * (g // 2)) & 0x0F0F0F0F
                codes[32 * half + 8 * g + k] = bitcast(U8x64, low | (high >> (2 * g) & 0x03030303) << 4)


@inlined
def _accumulate_q4_k(
    codes: Any, scales: Any, minima: Any, n: int, fields: Any, b: int, first: int, n_tokens: int, totals: Any
) -> None:
    accumulate_with_minima(codes, scales, minima, 15, n, fields, b, first, n_tokens, totals)


@inlined
def _accumulate_q5_k(
    codes: Any, scales: Any, minima: Any, n: int, fields: Any, b: int, first: int, n_tokens: int, totals: Any
) -> None:
    accumulate_with_minima(codes, scales, minima, 31, n, fields, b, first, n_tokens, totals)


@inlined
def _accumulate_q6_k(
    codes: Any, scales: Any, minima: Any, n: int, fields: Any, b: int, first: int, n_tokens: int, totals: Any
) -> None:
    accumulate_by_sixteen(codes, scales, 32, 63, fields, b, first, n_tokens, totals)


@kernel
def q4_k_by_tokens(job: int, start: int, stop: int) -> None:
    codes = scratch(U8x64, 64)
    tiles_by_tokens(job, start, stop, _unpack_q4_k, _accumulate_q4_k, codes, Q4_K.nbytes, 8)


@kernel
def q5_k_by_tokens(job: int, start: int, stop: int) -> None:
    codes = scratch(U8x64, 64)
    tiles_by_tokens(job, start, stop, _unpack_q5_k, _accumulate_q5_k, codes, Q5_K.nbytes, 8)


@kernel
def q6_k_by_tokens(job: int, start: int, stop: int) -> None:
    codes = scratch(U8x64, 64)
    tiles_by_tokens(job, start, stop, _unpack_q6_k, _accumulate_q6_k, codes, Q6_K.nbytes, 8)
