"""Tiles: sixteen vectors of sixteen floats in scratch, transposed on the way from and to memory, reduced side by side.

Two vectors whose numbers differ in one bit swap that bit with the same bit of the lane number: done for each of four
bits, that transposes a tile; combining the two into one each time reduces it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .memory import Scratch, address, load_floats, store_unaligned
from .vectors import INDEX, F32x16, I64x16, compare

Combine = Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]


@intrinsic
def load_transposed(typing: Any, array: Any, starts: Any, into: Any, first: Any) -> Any:
    """load_transposed(array, starts, tile, first): tile[k][lane] = array[starts[lane] + k], for the 16 k from first on.

    So that each lane works on a run of weights of its own, in their order. starts: I64x16; tile: scratch of F32x16.
    """
    if starts is not I64x16 or not _is_tile(into):
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        rows = []
        for lane in range(16):
            start = builder.add(builder.extract_element(args[1], ir.Constant(INDEX, lane)), args[3])
            rows.append(load_floats(context, builder, array, args[0], start))
        for c, column in enumerate(transposed(builder, rows)):
            builder.store(column, builder.gep(args[2], [builder.add(args[3], ir.Constant(args[3].type, c))]))
        return context.get_dummy_value()

    return types.void(array, starts, into, types.intp), lower


@intrinsic
def store_transposed(typing: Any, array: Any, starts: Any, tile: Any, first: Any) -> Any:
    """store_transposed(array, starts, tile, first): the inverse of load_transposed.

    array[starts[lane] + k] = tile[k][lane], for the 16 k from first on.
    """
    if starts is not I64x16 or not _is_tile(tile):
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, starts_, tile_, first_ = args
        columns = [
            builder.load(builder.gep(tile_, [builder.add(first_, ir.Constant(first_.type, c))])) for c in range(16)
        ]
        for lane, row in enumerate(transposed(builder, columns)):
            start = builder.add(builder.extract_element(starts_, ir.Constant(INDEX, lane)), first_)
            store_unaligned(builder, row, address(context, builder, array, args[0], start, F32x16.llvm))
        return context.get_dummy_value()

    return types.void(array, starts, tile, types.intp), lower


def _is_tile(kind: Any) -> bool:
    return isinstance(kind, Scratch) and kind.vector is F32x16


def _of_each(tile: Any, combine: Combine) -> Any:
    """Reduces the sixteen vectors of a tile side by side, which takes a third of the steps of one after the other.

    Whenever two vectors are combined, each has half as many lanes left that matter, and the two share a vector.
    """
    if not _is_tile(tile):
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        rows = [builder.load(builder.gep(args[0], [ir.Constant(INDEX, row)])) for row in range(16)]
        for bit in (1, 2, 4, 8):
            pairs = zip(rows[::2], rows[1::2], strict=True)
            rows = [combine(builder, *_swapped(builder, low, high, bit)) for low, high in pairs]
        return rows[0]

    return tile.vector(tile), lower


@intrinsic
def minima(typing: Any, tile: Any) -> Any:
    """minima(tile): in lane k the least lane of tile[k], of sixteen F32x16. Of zeros of both signs, any."""
    return _of_each(tile, lambda builder, a, b: builder.select(compare(builder, F32x16, "<", a, b), a, b))


@intrinsic
def maxima(typing: Any, tile: Any) -> Any:
    """maxima(tile): in lane k the greatest lane of tile[k], of sixteen F32x16. Of zeros of both signs, any."""
    return _of_each(tile, lambda builder, a, b: builder.select(compare(builder, F32x16, ">", a, b), a, b))


@intrinsic
def totals(typing: Any, tile: Any) -> Any:
    """totals(tile): in lane k the sum of the lanes of tile[k], of sixteen F32x16, added in pairs, neighbours first."""
    return _of_each(tile, lambda builder, a, b: builder.fadd(a, b))


def transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Sixteen rows of sixteen, or four rows of fours side by side: each four are transposed where they are.

    By swapping one bit of the row number with the same bit of the lane number at a time.
    """
    for bit in (1, 2, 4, 8)[: len(rows).bit_length() - 1]:
        swapped = list(rows)
        for row in range(len(rows)):
            if not row & bit:
                swapped[row], swapped[row | bit] = _swapped(builder, rows[row], rows[row | bit], bit)
        rows = swapped
    return rows


def _swapped(builder: ir.IRBuilder, low: ir.Value, high: ir.Value, bit: int) -> tuple[ir.Value, ir.Value]:
    """Two vectors whose numbers differ in a bit, after that bit was swapped with the same bit of the lane number."""
    n_lanes = low.type.count
    lane_type = ir.VectorType(INDEX, n_lanes)
    from_low = ir.Constant(lane_type, [lane if not lane & bit else n_lanes + (lane ^ bit) for lane in range(n_lanes)])
    from_high = ir.Constant(lane_type, [lane | bit if not lane & bit else n_lanes + lane for lane in range(n_lanes)])
    return builder.shuffle_vector(low, high, from_low), builder.shuffle_vector(low, high, from_high)
