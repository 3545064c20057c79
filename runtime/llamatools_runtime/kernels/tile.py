"""Many tokens: tiles of sixteen rows by all tokens, the way of reading a prompt. It is as fast as codes are multiplied.

Sixteen rows lie side by side in the lanes of a vector. 256 columns of them at a time are taken apart into codes, four
columns to a vector, and scales, which stay in the processor's nearest cache while all tokens are multiplied by them.
"""

from __future__ import annotations

from typing import Any

from llamatools.dtypes.simd import (
    LANE,
    F32x16,
    I8x16,
    I64x16,
    U8x16,
    U32x16,
    array_at,
    convert,
    dot_tokens,
    inlined,
    minimum,
    prefetch,
    scratch,
    splat,
    store,
)

from .job import BLOCKS, CODES, FIRST_SUMS, N_IN, N_ROWS, N_TOKENS, SCALES, SUMS, Y_STRIDE, Y

ROWS = 16  # of a tile
TOKENS = 64  # whose sums are kept at a time
TOGETHER = 4  # of them, that codes are multiplied by once they are in registers; what is left, one by one


@inlined
def tiles_by_tokens(
    job: int, start: int, stop: int, unpack: Any, accumulate: Any, codes: Any, nbytes: int, per_block: int
) -> None:
    """Rows start to stop, of blocks of nbytes that hold per_block times 32 weights.

    unpack(blocks, starts, n, columns, codes, scales, minima) takes n times 32 columns apart, from the bytes
    starts[lane] of row lane on; accumulate(codes, scales, minima, n, fields, b, first, n_tokens, totals) multiplies
    them. codes: scratch for 64 vectors of them.
    """
    fields = array_at(I64x16, job)
    blocks, y = array_at(U8x16, fields[BLOCKS]), array_at(F32x16, fields[Y])
    n_rows, n_blocks = fields[N_ROWS], fields[N_IN] // 32
    row_nbytes = n_blocks // per_block * nbytes
    columns, scales, minima = scratch(U32x16, 24), scratch(F32x16, 16), scratch(F32x16, 8)
    totals = scratch(F32x16, TOKENS)
    for row in range(start, stop, ROWS):
        rows = minimum(LANE + row, n_rows - 1)  # a last, short tile repeats a row
        for first in range(0, fields[N_TOKENS], TOKENS):
            n_tokens = min(TOKENS, fields[N_TOKENS] - first)
            for t in range(n_tokens):
                totals[t] = splat(F32x16, 0)
            for b in range(0, n_blocks, 8):
                n = min(8, n_blocks - b)
                unpack(blocks, rows * row_nbytes + b // per_block * nbytes, n, columns, codes, scales, minima)
                if first == 0:
                    _prefetch(blocks, row, row_nbytes, (b + 8) // per_block * nbytes, 8 // per_block * nbytes)
                accumulate(codes, scales, minima, n, fields, b, first, n_tokens, totals)
            for t in range(n_tokens):
                place = (first + t) * fields[Y_STRIDE] + row
                if row + ROWS <= stop:
                    store(y, place, totals[t])
                else:
                    for lane in range(stop - row):
                        y[place + lane] = totals[t][lane]


@inlined
def _prefetch(blocks: Any, row: int, row_nbytes: int, start: int, n: int) -> None:
    """Asks for what the tile that begins at `row` is next taken apart from: n bytes of each row from `start` on.

    After the rows' ends, the next tile's beginnings.
    """
    place = row * row_nbytes + start
    if start >= row_nbytes:
        place += (ROWS - 1) * row_nbytes
    for _ in range(ROWS):
        for line in range(0, n, 64):
            prefetch(blocks, place + line)
        place += row_nbytes


@inlined
def accumulate(
    codes: Any, scales: Any, bias: int, most: int, n: int, fields: Any, b: int, first: int, n_tokens: int, totals: Any
) -> None:
    """Adds scale * (code - bias) * x of n times 32 columns, those from block b on, to the totals of n_tokens tokens."""
    x, d, sums = array_at(I8x16, fields[CODES]), array_at(F32x16, fields[SCALES]), array_at(F32x16, fields[SUMS])
    fours = n_tokens - n_tokens % TOGETHER
    for t in range(0, fours, TOGETHER):
        total0, total1, total2, total3 = totals[t], totals[t + 1], totals[t + 2], totals[t + 3]
        for i in range(n):
            j = (b + i) * fields[N_TOKENS] + first + t
            dots = dot_tokens(codes, 8 * i, 8, most, x, 32 * j, 32, TOGETHER)
            total0 = total0 + (convert(F32x16, dots[0]) - bias * sums[j]) * (scales[i] * d[j])
            total1 = total1 + (convert(F32x16, dots[1]) - bias * sums[j + 1]) * (scales[i] * d[j + 1])
            total2 = total2 + (convert(F32x16, dots[2]) - bias * sums[j + 2]) * (scales[i] * d[j + 2])
            total3 = total3 + (convert(F32x16, dots[3]) - bias * sums[j + 3]) * (scales[i] * d[j + 3])
        totals[t], totals[t + 1], totals[t + 2], totals[t + 3] = total0, total1, total2, total3
    for t in range(fours, n_tokens):
        total = totals[t]
        for i in range(n):
            j = (b + i) * fields[N_TOKENS] + first + t
            dots = dot_tokens(codes, 8 * i, 8, most, x, 32 * j, 32, 1)
            total = total + (convert(F32x16, dots[0]) - bias * sums[j]) * (scales[i] * d[j])
        totals[t] = total


@inlined
def accumulate_with_minima(
    codes: Any, scales: Any, minima: Any, most: int, n: int, fields: Any, b: int, first: int, n_tokens: int, totals: Any
) -> None:
    """Adds (scale * code + minimum) * x of n times 32 columns, those from block b on, to the totals."""
    x, d, sums = array_at(I8x16, fields[CODES]), array_at(F32x16, fields[SCALES]), array_at(F32x16, fields[SUMS])
    fours = n_tokens - n_tokens % TOGETHER
    for t in range(0, fours, TOGETHER):
        total0, total1, total2, total3 = totals[t], totals[t + 1], totals[t + 2], totals[t + 3]
        for i in range(n):
            j = (b + i) * fields[N_TOKENS] + first + t
            dots = dot_tokens(codes, 8 * i, 8, most, x, 32 * j, 32, TOGETHER)
            total0 = total0 + (convert(F32x16, dots[0]) * scales[i] + minima[i] * sums[j]) * d[j]
            total1 = total1 + (convert(F32x16, dots[1]) * scales[i] + minima[i] * sums[j + 1]) * d[j + 1]
            total2 = total2 + (convert(F32x16, dots[2]) * scales[i] + minima[i] * sums[j + 2]) * d[j + 2]
            total3 = total3 + (convert(F32x16, dots[3]) * scales[i] + minima[i] * sums[j + 3]) * d[j + 3]
        totals[t], totals[t + 1], totals[t + 2], totals[t + 3] = total0, total1, total2, total3
    for t in range(fours, n_tokens):
        total = totals[t]
        for i in range(n):
            j = (b + i) * fields[N_TOKENS] + first + t
            dots = dot_tokens(codes, 8 * i, 8, most, x, 32 * j, 32, 1)
            total = total + (convert(F32x16, dots[0]) * scales[i] + minima[i] * sums[j]) * d[j]
        totals[t] = total


@inlined
def accumulate_by_sixteen(
    codes: Any, scales: Any, bias: int, most: int, fields: Any, b: int, first: int, n_tokens: int, totals: Any
) -> None:
    """As accumulate, of 256 columns which share x's scale and have a scale of their own for every sixteen."""
    x, d = array_at(I8x16, fields[CODES]), array_at(F32x16, fields[SCALES])
    fours = n_tokens - n_tokens % TOGETHER
    for t in range(0, fours, TOGETHER):
        part0 = splat(F32x16, 0)
        part1, part2, part3 = part0, part0, part0
        for i in range(8):
            j = (b + i) * fields[N_TOKENS] + first + t
            one = dot_tokens(codes, 8 * i, 4, most, x, 32 * j, 32, TOGETHER)
            two = dot_tokens(codes, 8 * i + 4, 4, most, x, 32 * j + 16, 32, TOGETHER)
            part0 = part0 + _two(fields, one[0], two[0], scales, i, bias, j)
            part1 = part1 + _two(fields, one[1], two[1], scales, i, bias, j + 1)
            part2 = part2 + _two(fields, one[2], two[2], scales, i, bias, j + 2)
            part3 = part3 + _two(fields, one[3], two[3], scales, i, bias, j + 3)
        j = b * fields[N_TOKENS] + first + t
        totals[t] = totals[t] + part0 * d[j]
        totals[t + 1] = totals[t + 1] + part1 * d[j + 1]
        totals[t + 2] = totals[t + 2] + part2 * d[j + 2]
        totals[t + 3] = totals[t + 3] + part3 * d[j + 3]
    for t in range(fours, n_tokens):
        part = splat(F32x16, 0)
        for i in range(8):
            j = (b + i) * fields[N_TOKENS] + first + t
            one = dot_tokens(codes, 8 * i, 4, most, x, 32 * j, 32, 1)
            two = dot_tokens(codes, 8 * i + 4, 4, most, x, 32 * j + 16, 32, 1)
            part = part + _two(fields, one[0], two[0], scales, i, bias, j)
        totals[t] = totals[t] + part * d[b * fields[N_TOKENS] + first + t]


@inlined
def _two(fields: Any, one: Any, two: Any, scales: Any, i: int, bias: int, j: int) -> Any:
    first_sum = array_at(F32x16, fields[FIRST_SUMS])[j]
    second_sum = array_at(F32x16, fields[SUMS])[j] - first_sum
    first = (convert(F32x16, one) - bias * first_sum) * scales[2 * i]
    return first + (convert(F32x16, two) - bias * second_sum) * scales[2 * i + 1]
