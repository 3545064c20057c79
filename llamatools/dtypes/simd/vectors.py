"""Vector types for Numba and their operators.

`+ - * /` round once each, as IEEE 754 says; `/` is for floats only. Integers wrap. `>>` keeps the sign of signed
lanes. Comparisons give a Mask16, which `& | ~` combine and `select` uses. A scalar operand stands for a vector of equal
lanes and takes the lane type: `codes - 8`, `0.5 * x`. `v[k]` is lane k. NaN compares as IEEE 754 says (never equal,
never less).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.imputils import lower_constant
from numba.extending import lower_builtin, models, register_model, type_callable, typeof_impl

INDEX = ir.IntType(32)

# Python's type of one lane -> how LLVM holds it; signedness is a matter of the operations
_ELEMENTS: dict[types.Type, ir.Type] = {
    types.float32: ir.FloatType(),
    types.boolean: ir.IntType(1),
    **{kind: ir.IntType(kind.bitwidth) for kind in (types.int8, types.uint8, types.uint16, types.int32, types.uint32)},
    types.int64: ir.IntType(64),
}


class Vector(types.Type):
    """The Numba type of a vector of `lanes` values of the scalar type `element`."""

    def __init__(self, name: str, element: types.Type, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        self.llvm = ir.VectorType(_ELEMENTS[element], lanes)
        super().__init__(name=name)

    @property
    def is_float(self) -> bool:
        return self.element is types.float32

    @property
    def is_signed(self) -> bool:
        return not self.is_float and bool(getattr(self.element, "signed", False))


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


F32x16 = Vector("F32x16", types.float32, 16)
I64x16 = Vector("I64x16", types.int64, 16)
I32x16 = Vector("I32x16", types.int32, 16)
U32x16 = Vector("U32x16", types.uint32, 16)
U16x16 = Vector("U16x16", types.uint16, 16)
I8x16 = Vector("I8x16", types.int8, 16)
U8x16 = Vector("U8x16", types.uint8, 16)
F32x4 = Vector("F32x4", types.float32, 4)
I32x4 = Vector("I32x4", types.int32, 4)
U32x4 = Vector("U32x4", types.uint32, 4)
U8x32 = Vector("U8x32", types.uint8, 32)
U8x64 = Vector("U8x64", types.uint8, 64)  # sixteen groups of four bytes, whose dot products fill an I32x16
I8x64 = Vector("I8x64", types.int8, 64)
Mask16 = Vector("Mask16", types.boolean, 16)


class VectorConstant:
    """A vector known when the module is read. To a kernel, a module's global that holds one is the vector itself."""

    def __init__(self, vector: Vector, values: Sequence[float]) -> None:
        self.vector = vector
        self.values = [float(v) if vector.is_float else int(v) for v in np.asarray(values)]


LANE: Any = VectorConstant(I64x16, range(16))  # the number of each lane


@typeof_impl.register(VectorConstant)
def _typeof_constant(constant: VectorConstant, context: Any) -> Vector:
    return constant.vector


@lower_constant(Vector)
def _constant(context: Any, builder: ir.IRBuilder, vector: Vector, constant: VectorConstant) -> ir.Constant:
    return ir.Constant(vector.llvm, constant.values)


def filled(vector: Vector, value: float) -> ir.Constant:
    """The LLVM constant with `value` in every lane."""
    return ir.Constant(vector.llvm, [value] * vector.lanes)


def broadcast(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """The LLVM scalar in each of `lanes` lanes."""
    vector = ir.VectorType(scalar.type, lanes)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(INDEX, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INDEX, lanes), [0] * lanes))


def as_vector(context: Any, builder: ir.IRBuilder, value: ir.Value, kind: types.Type, vector: Vector) -> ir.Value:
    """A Numba value as a `vector`: unchanged if it is one, else a scalar, cast to the lane type and broadcast."""
    if isinstance(kind, Vector):
        return value
    return broadcast(builder, context.cast(builder, value, kind, vector.element), vector.lanes)


def common_vector(*kinds: types.Type) -> Vector | None:
    """The one vector type among the operands, the others being scalars; None where there is none or more than one."""
    vectors = {kind for kind in kinds if isinstance(kind, Vector)}
    if len(vectors) != 1 or not all(isinstance(kind, Vector | types.Number) for kind in kinds):
        return None
    vector: Vector = vectors.pop()
    return vector


Combine = Callable[[ir.IRBuilder, Vector, ir.Value, ir.Value], ir.Value]


def _binary(operation: Any, result: Callable[[Vector], Vector | None], combine: Combine) -> None:
    """Teaches Numba `operation` on two vectors of one type, or on a vector and a scalar."""

    @type_callable(operation)
    def typing(context: Any) -> Any:
        def of(left: types.Type, right: types.Type) -> types.Type | None:
            vector = common_vector(left, right)
            return None if vector is None else result(vector)

        return of

    def lowering(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vector: Any = common_vector(*signature.args)
        sides = zip(args, signature.args, strict=True)
        return combine(builder, vector, *(as_vector(context, builder, side, kind, vector) for side, kind in sides))

    for pair in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(operation, *pair)(lowering)


def _arithmetic(operation: Any, for_floats: str, for_integers: str) -> None:
    def combine(builder: ir.IRBuilder, vector: Vector, left: ir.Value, right: ir.Value) -> ir.Value:
        return getattr(builder, for_floats if vector.is_float else for_integers)(left, right)

    _binary(operation, lambda vector: None if vector is Mask16 else vector, combine)


def _on_bits(operation: Any, of_signed: str, of_unsigned: str, masks: bool) -> None:
    def combine(builder: ir.IRBuilder, vector: Vector, left: ir.Value, right: ir.Value) -> ir.Value:
        return getattr(builder, of_signed if vector.is_signed else of_unsigned)(left, right)

    _binary(operation, lambda v: None if v.is_float or (v is Mask16 and not masks) else v, combine)


def compare(builder: ir.IRBuilder, vector: Vector, sign: str, left: ir.Value, right: ir.Value) -> ir.Value:
    """LLVM: the mask of a comparison, whose sign is Python's."""
    if vector.is_float:  # != is true of NaN, all others are false
        return (builder.fcmp_unordered if sign == "!=" else builder.fcmp_ordered)(sign, left, right)
    return (builder.icmp_signed if vector.is_signed else builder.icmp_unsigned)(sign, left, right)


def _comparison(operation: Any, sign: str) -> None:
    def combine(builder: ir.IRBuilder, vector: Vector, left: ir.Value, right: ir.Value) -> ir.Value:
        return compare(builder, vector, sign, left, right)

    _binary(operation, lambda vector: None if vector is Mask16 else Mask16, combine)


_arithmetic(operator.add, "fadd", "add")
_arithmetic(operator.sub, "fsub", "sub")
_arithmetic(operator.mul, "fmul", "mul")
_binary(operator.truediv, lambda v: v if v.is_float else None, lambda builder, _, a, b: builder.fdiv(a, b))
# Whole division exists for indices, which are never negative. No processor has it: each lane is divided on its own.
_binary(operator.floordiv, lambda v: v if v is I64x16 else None, lambda builder, _, a, b: builder.sdiv(a, b))
_on_bits(operator.and_, "and_", "and_", masks=True)
_on_bits(operator.or_, "or_", "or_", masks=True)
_on_bits(operator.xor, "xor", "xor", masks=True)
_on_bits(operator.lshift, "shl", "shl", masks=False)
_on_bits(operator.rshift, "ashr", "lshr", masks=False)
_comparison(operator.lt, "<")
_comparison(operator.le, "<=")
_comparison(operator.gt, ">")
_comparison(operator.ge, ">=")
_comparison(operator.eq, "==")
_comparison(operator.ne, "!=")


def _unary(operation: Any, allowed: Callable[[Vector], bool], lower: Callable[[Any, Vector, Any], Any]) -> None:
    @type_callable(operation)
    def typing(context: Any) -> Any:
        def of(vector: types.Type) -> types.Type | None:
            return vector if isinstance(vector, Vector) and allowed(vector) else None

        return of

    @lower_builtin(operation, Vector)
    def lowering(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return lower(builder, signature.return_type, args[0])


def _absolute(builder: ir.IRBuilder, vector: Vector, value: ir.Value) -> ir.Value:
    integers = ir.VectorType(ir.IntType(32), vector.lanes)
    bits = builder.and_(builder.bitcast(value, integers), ir.Constant(integers, [0x7FFFFFFF] * vector.lanes))
    return builder.bitcast(bits, vector.llvm)


_unary(operator.neg, lambda v: v.is_float, lambda builder, _, value: builder.fneg(value))
_unary(operator.invert, lambda v: not v.is_float, lambda builder, _, value: builder.not_(value))
_unary(abs, lambda v: v.is_float, _absolute)


@type_callable(operator.getitem)
def _lane_type(context: Any) -> Any:
    def of(vector: types.Type, lane: types.Type) -> types.Type | None:
        return vector.element if isinstance(vector, Vector) and isinstance(lane, types.Integer) else None

    return of


@lower_builtin(operator.getitem, Vector, types.Integer)
def _lane(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
    return builder.extract_element(args[0], args[1])
