"""Vectors in arrays, and scratch space for vectors.

Arrays are one-dimensional and contiguous; an index counts the array's own items. Nothing is checked against the array's
bounds: kernels are given ranges of whole blocks. Alignment is never needed.

Weights may be float32 or bfloat16, which is the upper half of a float32 and held as uint16: what is loaded as F32x16
from an array of uint16 is made whole on the way. So what reads weights takes either, and is compiled for each.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, errors, types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable
from numba.np.arrayobj import make_array, populate_array

from .vectors import INDEX, F32x16, U16x16, U32x16, Vector, filled


def address(context: Any, builder: ir.IRBuilder, kind: types.Array, array: ir.Value, index: ir.Value, to: Any) -> Any:
    """The LLVM pointer, to the LLVM type `to`, of an array's item."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def load_unaligned(builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    value = builder.load(pointer)
    value.align = 1
    return value


def store_unaligned(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    builder.store(value, pointer).align = 1


@intrinsic
def array_at(typing: Any, vector: Any, where: Any) -> Any:
    """array_at(F32x16, address): an array, of no known length, of the vector's lane type, at an address in memory."""
    kind = types.Array(vector.instance_type.element, 1, "C")

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        array = make_array(kind)(context, builder)
        zero, size = ir.Constant(ir.IntType(64), 0), ir.Constant(ir.IntType(64), kind.dtype.bitwidth // 8)
        data = builder.inttoptr(args[1], array.data.type)
        populate_array(array, data=data, shape=[zero], strides=[size], itemsize=size, meminfo=None)
        return array._getvalue()

    return kind(vector, types.intp), lower


@intrinsic
def address_of(typing: Any, array: Any) -> Any:
    """The address of an array's first item."""
    if not isinstance(array, types.Array):
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.ptrtoint(context.make_array(array)(context, builder, args[0]).data, ir.IntType(64))

    return types.intp(array), lower


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """prefetch(array, index): asks for the cache line of array[index], which need not be in the array."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = address(context, builder, array, args[0], args[1], ir.IntType(8))
        flags = [ir.Constant(INDEX, flag) for flag in (0, 3, 1)]  # to read; into every cache; data
        kinds = [pointer.type, *(flag.type for flag in flags)]
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0"
        )
        builder.call(function, [pointer, *flags])
        return context.get_dummy_value()

    return types.void(array, types.intp), lower


@intrinsic
def load(typing: Any, vector: Any, array: Any, index: Any) -> Any:
    """load(F32x16, array, index): the lanes lie one after the other from array[index] on, whatever its dtype.

    But F32x16 from an array of uint16 is sixteen bfloat16.
    """
    kind = vector.instance_type

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if kind is F32x16:
            return load_floats(context, builder, array, args[1], args[2])
        return load_unaligned(builder, address(context, builder, array, args[1], args[2], kind.llvm))

    return kind(vector, array, types.intp), lower


def load_floats(context: Any, builder: ir.IRBuilder, kind: types.Array, array: ir.Value, index: ir.Value) -> ir.Value:
    """LLVM: sixteen floats from index on, of an array of float32 or of bfloat16."""
    if kind.dtype is not types.uint16:
        return load_unaligned(builder, address(context, builder, kind, array, index, F32x16.llvm))
    halves = load_unaligned(builder, address(context, builder, kind, array, index, U16x16.llvm))
    bits = builder.shl(builder.zext(halves, U32x16.llvm), filled(U32x16, 16))
    return builder.bitcast(bits, F32x16.llvm)


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """store(array, index, value): the vector's lanes one after the other from array[index] on, whatever its dtype."""
    if not isinstance(value, Vector):
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        store_unaligned(builder, args[2], address(context, builder, array, args[0], args[1], value.llvm))
        return context.get_dummy_value()

    return types.void(array, types.intp, value), lower


class Scratch(types.Type):
    """The Numba type of vectors on the stack: `s[k]` and `s[k] = v`. Its length is known only to who made it."""

    def __init__(self, vector: Vector) -> None:
        self.vector = vector
        super().__init__(name=f"Scratch({vector.name})")


@register_model(Scratch)
class _ScratchModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Scratch) -> None:
        super().__init__(manager, kind, kind.vector.llvm.as_pointer())


@intrinsic(prefer_literal=True)
def scratch(typing: Any, vector: Any, length: Any) -> Any:
    """scratch(F32x16, n): room for n vectors, n a literal, uninitialized.

    On the stack, where LLVM can tell that nothing else writes to it: room from the heap cost half the speed.
    It must not be returned: it ends with the function that makes it, an inlined one, too.
    """
    if not isinstance(length, types.IntegerLiteral):
        raise errors.RequireLiteralValue("the length of scratch must be a literal")
    kind = vector.instance_type

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(kind.llvm, length.literal_value))
            room.align = 64
        return builder.bitcast(room, kind.llvm.as_pointer())

    return Scratch(kind)(vector, length), lower


@type_callable(operator.getitem)
def _item_type(context: Any) -> Any:
    def of(space: types.Type, index: types.Type) -> types.Type | None:
        return space.vector if isinstance(space, Scratch) and isinstance(index, types.Integer) else None

    return of


@lower_builtin(operator.getitem, Scratch, types.Integer)
def _get_item(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
    return builder.load(builder.gep(args[0], [args[1]]))


@type_callable(operator.setitem)
def _set_item_type(context: Any) -> Any:
    def of(space: types.Type, index: types.Type, value: types.Type) -> types.Type | None:
        fits = isinstance(space, Scratch) and isinstance(index, types.Integer) and value is space.vector
        return types.void if fits else None

    return of


@lower_builtin(operator.setitem, Scratch, types.Integer, Vector)
def _set_item(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
    builder.store(args[2], builder.gep(args[0], [args[1]]))
    return context.get_dummy_value()


@intrinsic
def lane(typing: Any, space: Any, index: Any, number: Any) -> Any:
    """lane(s, k, n): lane n of vector k in scratch, n not known before."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.load(_lane_address(builder, *args[:3]))

    return space.vector.element(space, types.intp, types.intp), lower


@intrinsic
def set_lane(typing: Any, space: Any, index: Any, number: Any, value: Any) -> Any:
    """set_lane(s, k, n, value): the same, written."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.store(args[3], _lane_address(builder, *args[:3]))
        return context.get_dummy_value()

    return types.void(space, types.intp, types.intp, space.vector.element), lower


def _lane_address(builder: ir.IRBuilder, space: ir.Value, index: ir.Value, number: ir.Value) -> ir.Value:
    vector = builder.gep(space, [index])
    element = vector.type.pointee.element
    return builder.gep(builder.bitcast(vector, element.as_pointer()), [number])


@intrinsic
def lanes_of(typing: Any, tile: Any) -> Any:
    """lanes_of(scratch): the numbers in the lanes of scratch one after the other, as an array of no known length."""
    if not isinstance(tile, Scratch):
        return None
    kind = types.Array(tile.vector.element, 1, "C")

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        array = make_array(kind)(context, builder)
        zero, size = ir.Constant(ir.IntType(64), 0), ir.Constant(ir.IntType(64), kind.dtype.bitwidth // 8)
        data = builder.bitcast(args[0], array.data.type)
        populate_array(array, data=data, shape=[zero], strides=[size], itemsize=size, meminfo=None)
        return array._getvalue()

    return kind(tile), lower
