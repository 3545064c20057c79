"""One token: rows of 32-weight blocks by a vector, the way of generating. It is as fast as the rows come from memory.

A row is read once, from its first byte to its last, with a request some way ahead of it. Four blocks at a time make
twice 64 codes: the first halves of the blocks, and their second halves, in the order in which the activations of a
single token lie (activations.py). Their products with these are added up, exactly, to sixteen numbers, four per block.
"""

from __future__ import annotations

from typing import Any

from llamatools.dtypes.simd import (
    F32x4,
    F32x16,
    I8x64,
    I32x16,
    I64x16,
    U8x16,
    array_at,
    convert,
    dot_two,
    inlined,
    load,
    load_halves,
    prefetch,
    reduce_add,
    splat,
    spread,
)

from .job import BLOCKS, CODES, N_IN, PARTIAL_SUMS, SCALES, SUMS, Y

AHEAD = 3072  # bytes


@inlined
def rows_by_vector(
    job: int, start: int, stop: int, codes_of: Any, nbytes: int, bias: int, most: int, has_minimum: bool
) -> None:
    """Rows start to stop of blocks that begin with a float16 d: weights are d * (code - bias), or d * code + m.

    codes_of(blocks, p0, p1, p2, p3): the codes of the blocks at these places, as two vectors, of at most `most`.
    has_minimum: whether m, float16, follows d.
    """
    fields = array_at(I64x16, job)
    blocks, y, n_blocks = array_at(U8x16, fields[BLOCKS]), array_at(F32x16, fields[Y]), fields[N_IN] // 32
    for row in range(start, stop):
        p = row * n_blocks * nbytes
        total, least = splat(F32x16, 0), splat(F32x4, 0)
        for b in range(0, n_blocks - 3, 4):
            prefetch(blocks, p + AHEAD)
            prefetch(blocks, p + AHEAD + 64)
            places = p, p + nbytes, p + 2 * nbytes, p + 3 * nbytes
            products, d = _four_blocks(fields, blocks, places, b, codes_of, bias, most)
            total = total + products * spread(load_halves(blocks, *places) * d, 0)
            if has_minimum:
                least = least + _four_minima(fields, blocks, places, b) * d
            p += 4 * nbytes
        if n_blocks % 4:  # the blocks that the last four lack repeat another; their activations are zero
            b, last = n_blocks // 4 * 4, n_blocks % 4 - 1
            places = p, p + nbytes * min(1, last), p + nbytes * min(2, last), p + nbytes * last
            products, d = _four_blocks(fields, blocks, places, b, codes_of, bias, most)
            total = total + products * spread(load_halves(blocks, *places) * d, 0)
            if has_minimum:
                least = least + _four_minima(fields, blocks, places, b) * d
        y[row] = reduce_add(total) + reduce_add(least)


@inlined
def _four_blocks(fields: Any, blocks: Any, places: Any, b: int, codes_of: Any, bias: int, most: int) -> tuple[Any, Any]:
    """The products of four blocks' codes, less bias, and activations: an F32x16, four lanes per block. And x's d."""
    first, second = codes_of(blocks, *places)
    products = dot_two(first, _codes(fields, 32 * b), second, _codes(fields, 32 * b + 64), most)
    products = products - load(I32x16, array_at(I32x16, fields[PARTIAL_SUMS]), 4 * b) * bias
    return convert(F32x16, products), load(F32x4, array_at(F32x16, fields[SCALES]), b)


@inlined
def _four_minima(fields: Any, blocks: Any, places: Any, b: int) -> Any:
    """The minima of four blocks, which lie two bytes after their beginning, times the sums of x's codes."""
    minima = load_halves(blocks, places[0] + 2, places[1] + 2, places[2] + 2, places[3] + 2)
    return minima * load(F32x4, array_at(F32x16, fields[SUMS]), b)


@inlined
def _codes(fields: Any, first: int) -> Any:
    return load(I8x64, array_at(I8x64, fields[CODES]), first)
