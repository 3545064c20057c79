"""float16 to float32 and back: the processor's own instructions, or exact integer arithmetic where it has none.

Both round to nearest, ties to even, keep subnormals, overflow to infinity, and make a signalling NaN quiet with its
payload kept: every bit pattern converts alike everywhere. (Without hardware, LLVM would call functions that a process
of Python does not have.)
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .memory import address, load_unaligned, store_unaligned
from .targets import features
from .vectors import INDEX, F32x4, F32x16, U16x16

I16, I32, F16, F32 = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


def _shaped(element: ir.Type, like: ir.Type) -> ir.Type:
    return ir.VectorType(element, like.count) if isinstance(like, ir.VectorType) else element


def _constant(kind: ir.Type, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def widened(builder: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """LLVM: the bits of one or more float16, as i16, to float32."""
    if "half" in features():
        return builder.fpext(builder.bitcast(half, _shaped(F16, half.type)), _shaped(F32, half.type))
    return software_widened(builder, half)


def narrowed(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """LLVM: one or more float32 to the bits of float16, as i16."""
    if "half" in features():
        return builder.bitcast(builder.fptrunc(value, _shaped(F16, value.type)), _shaped(I16, value.type))
    return software_narrowed(builder, value)


def software_widened(builder: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """The bits move up by 13 and the exponent's bias grows from 15 to 127, which differs by kind of number.

    No operand or result of float arithmetic is subnormal here, so no setting of the processor can change it.
    """
    integers, floats = _shaped(I32, half.type), _shaped(F32, half.type)

    def bits(value: int) -> ir.Constant:
        return _constant(integers, value)

    wide = builder.zext(half, integers)
    sign = builder.shl(builder.and_(wide, bits(0x8000)), bits(16))
    magnitude = builder.and_(wide, bits(0x7FFF))
    moved = builder.shl(magnitude, bits(13))
    normal = builder.add(moved, bits((127 - 15) << 23))
    # A subnormal m * 2^-24 is (1 + m * 2^-10) * 2^-14, less 2^-14: the subtraction normalizes it.
    smallest_normal = bits((127 - 14) << 23)
    raised = builder.bitcast(builder.add(moved, smallest_normal), floats)
    subnormal = builder.bitcast(builder.fsub(raised, builder.bitcast(smallest_normal, floats)), integers)
    quiet = builder.select(builder.icmp_unsigned(">", magnitude, bits(0x7C00)), bits(0x400000), bits(0))
    infinite_or_nan = builder.or_(builder.add(moved, bits((255 - 31) << 23)), quiet)
    result = builder.select(builder.icmp_unsigned("<", magnitude, bits(0x0400)), subnormal, normal)
    result = builder.select(builder.icmp_unsigned(">=", magnitude, bits(0x7C00)), infinite_or_nan, result)
    return builder.bitcast(builder.or_(result, sign), floats)


def software_narrowed(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Rounds by integer addition where the result is normal, by float addition where it is subnormal."""
    integers, floats = _shaped(I32, value.type), value.type

    def bits(value: int) -> ir.Constant:
        return _constant(integers, value)

    wide = builder.bitcast(value, integers)
    sign = builder.and_(builder.lshr(wide, bits(16)), bits(0x8000))
    magnitude = builder.and_(wide, bits(0x7FFFFFFF))
    # Half of the last kept bit, less one if that bit is even, carries upwards exactly where rounding is upwards.
    odd = builder.and_(builder.lshr(magnitude, bits(13)), bits(1))
    rebiased = builder.add(builder.add(magnitude, bits(-((127 - 15) << 23) + 0xFFF)), odd)
    normal = builder.lshr(rebiased, bits(13))
    # The last bit of 0.5 in float32 is 2^-24, a float16's least subnormal: adding 0.5 rounds to that.
    one_half = bits(0x3F000000)
    raised = builder.fadd(builder.bitcast(magnitude, floats), builder.bitcast(one_half, floats))
    subnormal = builder.sub(builder.bitcast(raised, integers), one_half)
    nan = builder.or_(builder.and_(builder.lshr(magnitude, bits(13)), bits(0x3FF)), bits(0x7E00))
    result = builder.select(builder.icmp_unsigned("<", magnitude, bits((127 - 14) << 23)), subnormal, normal)
    result = builder.select(builder.icmp_unsigned(">=", magnitude, bits((127 + 16) << 23)), bits(0x7C00), result)
    result = builder.select(builder.icmp_unsigned(">", magnitude, bits(0x7F800000)), nan, result)
    return builder.trunc(builder.or_(result, sign), _shaped(I16, value.type))


@intrinsic
def half_to_float(typing: Any, halves: Any) -> Any:
    """The bits of sixteen float16, a U16x16, as float32."""
    if halves is not U16x16:
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return widened(builder, args[0])

    return F32x16(halves), lower


@intrinsic
def float_to_half(typing: Any, values: Any) -> Any:
    """Sixteen float32 rounded to float16, as their bits, a U16x16."""
    if values is not F32x16:
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return narrowed(builder, args[0])

    return U16x16(values), lower


@intrinsic
def load_half(typing: Any, array: Any, index: Any) -> Any:
    """load_half(array, index): the float16 at array[index], of an array of any dtype, as float32."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        half = load_unaligned(builder, address(context, builder, array, args[0], args[1], I16))
        return widened(builder, half) if "half" not in features() else _widened_alone(builder, half)

    return types.float32(array, types.intp), lower


def _widened_alone(builder: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """As `widened`, for one, and no slower where it begins each turn of a loop.

    LLVM would load a half into a register whatever else that holds, and if that is a sum, each turn of the loop waits
    for the one before. So it is shown a vector of zeros to put the half into, and not shown, by assembly that does
    nothing, that they are not needed.
    """
    kind = ir.FunctionType(I32, [I32])
    hidden = builder.asm(kind, "", "=r,0", [builder.zext(half, I32)], side_effect=False)
    zeros = ir.Constant(ir.VectorType(I32, 4), [0] * 4)
    halves = builder.bitcast(builder.insert_element(zeros, hidden, I32(0)), ir.VectorType(F16, 8))
    lanes = ir.Constant(ir.VectorType(I32, 4), [0, 1, 2, 3])
    four = builder.shuffle_vector(halves, ir.Constant(halves.type, ir.Undefined), lanes)
    return builder.extract_element(builder.fpext(four, ir.VectorType(F32, 4)), I32(0))


@intrinsic
def load_halves(typing: Any, array: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The float16 that begin at array[a], [b], [c] and [d], as an F32x4."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        four = ir.Constant(ir.VectorType(I16, 4), ir.Undefined)
        for k, index in enumerate(args[1:]):
            half = load_unaligned(builder, address(context, builder, array, args[0], index, I16))
            four = builder.insert_element(four, half, ir.Constant(INDEX, k))
        return widened(builder, four)

    return F32x4(array, *(types.intp,) * 4), lower


@intrinsic
def store_half(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """store_half(array, index, value): rounds a float32 to float16 and puts it at array[index], of any dtype.

    Returns what was stored, as float32.
    """

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        half = narrowed(builder, args[2])
        store_unaligned(builder, half, address(context, builder, array, args[0], args[1], I16))
        return widened(builder, half)

    return types.float32(array, types.intp, types.float32), lower
