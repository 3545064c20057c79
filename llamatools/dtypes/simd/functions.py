"""Functions of vectors, lane by lane and across lanes, callable in compiled code.

Arguments called `a` and `b` are vectors of one type, or one of them a scalar, as for the operators.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .targets import features
from .vectors import INDEX, F32x16, I32x16, Mask16, Vector, as_vector, broadcast, common_vector, compare, filled


def call(builder: ir.IRBuilder, name: str, returns: ir.Type, *args: ir.Value) -> ir.Value:
    """Calls an LLVM intrinsic."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(returns, [arg.type for arg in args]), name
    )
    return builder.call(function, args)


def selected(builder: ir.IRBuilder, mask: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """LLVM: a where the mask is true, else b, a zero with its sign.

    LLVM takes `x < 0 ? x : 0` for a minimum whose zero may have either sign, and emits arm64's fminnm, which makes -0
    of -0 (llvm-project's issue 93414; minps of x86-64 is what is written). It does so where it sees that what is
    compared is what is chosen; behind a fence, which is no instruction, it does not.
    """
    if "neon" in features() and isinstance(b.type.element, ir.FloatType):
        b = call(builder, f"llvm.arithmetic.fence.v{b.type.count}f32", b.type, b)
    return builder.select(mask, a, b)


@intrinsic
def splat(typing: Any, vector: Any, value: Any) -> Any:
    """splat(F32x16, value): the scalar in every lane."""
    kind = vector.instance_type

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return as_vector(context, builder, args[1], value, kind)

    return kind(vector, value), lower


# ---- lane by lane


@intrinsic
def select(typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """a where the mask is true, else b. Two scalars become vectors of their type: float32 or int32."""
    if mask is not Mask16:
        return None
    vector = common_vector(a, b)
    if vector is None:
        vector = I32x16 if isinstance(a, types.Integer) and isinstance(b, types.Integer) else F32x16

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        chosen = (as_vector(context, builder, arg, kind, vector) for arg, kind in zip(args[1:], (a, b), strict=True))
        return selected(builder, args[0], *chosen)

    return vector(mask, a, b), lower


def _extreme(sign: str, a: Any, b: Any) -> Any:
    vector = common_vector(a, b)
    if vector is None:
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        left, right = (as_vector(context, builder, arg, kind, vector) for arg, kind in zip(args, (a, b), strict=True))
        return selected(builder, compare(builder, vector, sign, left, right), left, right)

    return vector(a, b), lower


@intrinsic
def minimum(typing: Any, a: Any, b: Any) -> Any:
    """a < b ? a : b, as C and the minps instruction have it: b where they are equal or either is NaN."""
    return _extreme("<", a, b)


@intrinsic
def maximum(typing: Any, a: Any, b: Any) -> Any:
    """a > b ? a : b, as C and the maxps instruction have it: b where they are equal or either is NaN."""
    return _extreme(">", a, b)


@intrinsic(prefer_literal=True)
def clamp(typing: Any, x: Any, low: Any, high: Any) -> Any:
    """x limited to low..high (scalars); NaN becomes low, so that what follows can convert it.

    A low of 0 means -0. high is not 0: for any other number the processor's own minimum is what is meant.
    """
    if not isinstance(x, Vector):
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        lowest, highest = (as_vector(context, builder, args[k], kind, x) for k, kind in ((1, low), (2, high)))
        if x.is_float and getattr(low, "literal_value", None) == 0:
            lowest = filled(x, -0.0)  # x86 has one instruction for this maximum, while LLVM makes two of that with 0
        value = selected(builder, compare(builder, x, ">", args[0], lowest), args[0], lowest)
        return builder.select(compare(builder, x, "<", value, highest), value, highest)

    return x(x, low, high), lower


def _of_floats(name: str, x: Any) -> Any:
    if not isinstance(x, Vector) or not x.is_float:
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return call(builder, f"llvm.{name}.v{x.lanes}f32", x.llvm, *args)

    return x(x), lower


@intrinsic
def sqrt(typing: Any, x: Any) -> Any:
    """The square root, correctly rounded."""
    return _of_floats("sqrt", x)


@intrinsic
def rint(typing: Any, x: Any) -> Any:
    """The nearest whole number, ties to even, as a float: C's rintf, and ggml's nearest_int where that is defined."""
    return _of_floats("rint", x)


@intrinsic
def round_half_away(typing: Any, x: Any) -> Any:
    """The nearest whole number, ties away from zero, as a float: C's roundf."""
    return _of_floats("round", x)


@intrinsic
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the processor can, else twice: not for what must be equal everywhere.

    c is a vector of floats; a or b may be a scalar.
    """
    vector = common_vector(a, b, c)
    if vector is None or vector is not c or not vector.is_float:
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        operands = [as_vector(context, builder, arg, kind, vector) for arg, kind in zip(args, (a, b, c), strict=True)]
        return call(builder, f"llvm.fmuladd.v{vector.lanes}f32", vector.llvm, *operands)

    return vector(a, b, c), lower


@intrinsic
def convert(typing: Any, vector: Any, value: Any) -> Any:
    """convert(I32x16, value): as C casts. Floats become I32 only and must be in range (see clamp); integers wrap."""
    to = vector.instance_type
    if not isinstance(value, Vector) or (value.is_float and to is not I32x16):
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if value.is_float:
            return builder.fptosi(args[1], to.llvm)
        if to.is_float:
            return (builder.sitofp if value.is_signed else builder.uitofp)(args[1], to.llvm)
        grows = to.element.bitwidth - value.element.bitwidth
        if grows == 0:
            return args[1]
        return (builder.trunc if grows < 0 else builder.sext if value.is_signed else builder.zext)(args[1], to.llvm)

    return to(vector, value), lower


@intrinsic
def bitcast(typing: Any, vector: Any, value: Any) -> Any:
    """bitcast(U32x16, value): the same bits as another type of the same width."""
    to = vector.instance_type

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[1], to.llvm)

    return to(vector, value), lower


# ---- across lanes


@intrinsic
def lookup(typing: Any, table: Any, index: Any) -> Any:
    """table[index] per lane: sixteen floats, looked up by the low four bits of an I32x16."""
    if table is not F32x16 or index is not I32x16:
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        available = features()
        for feature, look_up in (("avx512", _lookup_avx512), ("avx2", _lookup_avx2), ("neon", _lookup_neon)):
            if feature in available:
                return look_up(builder, *args)
        return _lookup_generic(builder, *args)

    return F32x16(table, index), lower


def _lookup_avx512(builder: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    return call(builder, "llvm.x86.avx512.permvar.sf.512", table.type, table, index)


def _lookup_avx2(builder: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    """Both halves of the table by the low three bits, then a choice by the fourth."""
    halves = []
    for half in range(2):
        wanted = part(builder, index, half, 8)
        low, high = (
            call(builder, "llvm.x86.avx2.permps", ir.VectorType(ir.FloatType(), 8), part(builder, table, k, 8), wanted)
            for k in range(2)
        )
        halves.append(builder.select(_bit_is_set(builder, wanted, 8), high, low))
    return joined_all(builder, halves)


def _lookup_neon(builder: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    """The table as 64 bytes in four registers; float i is its bytes 4i to 4i + 3."""
    sixteen_bytes = ir.VectorType(ir.IntType(8), 16)
    first = builder.mul(builder.and_(index, filled(I32x16, 15)), filled(I32x16, 0x04040404))
    each = builder.bitcast(builder.add(first, filled(I32x16, 0x03020100)), ir.VectorType(ir.IntType(8), 64))
    as_bytes = builder.bitcast(table, each.type)
    quarters = [part(builder, as_bytes, k, 16) for k in range(4)]
    found = [
        call(builder, "llvm.aarch64.neon.tbl4.v16i8", sixteen_bytes, *quarters, part(builder, each, k, 16))
        for k in range(4)
    ]
    return builder.bitcast(joined_all(builder, found), table.type)


def _lookup_generic(builder: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    """A tree of choices, one level per bit of the index."""
    level = [broadcast(builder, builder.extract_element(table, ir.Constant(INDEX, k)), 16) for k in range(16)]
    for bit in (1, 2, 4, 8):
        is_set = _bit_is_set(builder, index, bit)
        level = [builder.select(is_set, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _bit_is_set(builder: ir.IRBuilder, value: ir.Value, bit: int) -> ir.Value:
    lanes = value.type.count
    return builder.icmp_signed(
        "!=", builder.and_(value, ir.Constant(value.type, [bit] * lanes)), ir.Constant(value.type, [0] * lanes)
    )


def part(builder: ir.IRBuilder, value: ir.Value, n: int, lanes: int) -> ir.Value:
    """LLVM: the n-th run of `lanes` lanes."""
    which = ir.Constant(ir.VectorType(INDEX, lanes), [n * lanes + k for k in range(lanes)])
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), which)


def joined_all(builder: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """LLVM: the lanes of a power of two of equal vectors, one after the other."""
    while len(parts) > 1:
        lanes = 2 * parts[0].type.count
        which = ir.Constant(ir.VectorType(INDEX, lanes), list(range(lanes)))
        parts = [builder.shuffle_vector(a, b, which) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _reduce(sign: str, x: Any) -> Any:
    if not isinstance(x, Vector):
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        value, lanes = args[0], x.lanes
        while lanes > 1:
            lanes //= 2
            low, high = part(builder, value, 0, lanes), part(builder, value, 1, lanes)
            value = builder.select(compare(builder, x, sign, low, high), low, high)
        return builder.extract_element(value, ir.Constant(INDEX, 0))

    return x.element(x), lower


@intrinsic
def reduce_min(typing: Any, x: Any) -> Any:
    """The least lane. Of zeros of both signs, any."""
    return _reduce("<", x)


@intrinsic
def reduce_max(typing: Any, x: Any) -> Any:
    """The greatest lane. Of zeros of both signs, any."""
    return _reduce(">", x)


@intrinsic
def reduce_add(typing: Any, x: Any) -> Any:
    """The sum of the lanes: halves are added to each other until one number is left, in this order everywhere."""
    if not isinstance(x, Vector):
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        value, lanes = args[0], x.lanes
        while lanes > 1:
            lanes //= 2
            low, high = part(builder, value, 0, lanes), part(builder, value, 1, lanes)
            value = (builder.fadd if x.is_float else builder.add)(low, high)
        return builder.extract_element(value, ir.Constant(INDEX, 0))

    return x.element(x), lower


@intrinsic
def bits_of(typing: Any, mask: Any) -> Any:
    """A mask as a number: bit k is lane k."""
    if mask is not Mask16:
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.zext(builder.bitcast(args[0], ir.IntType(16)), ir.IntType(32))

    return types.uint32(mask), lower


@intrinsic
def mask_of(typing: Any, bits: Any) -> Any:
    """The mask whose lane k is bit k of the number."""
    if not isinstance(bits, types.Integer):
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(context.cast(builder, args[0], bits, types.uint16), Mask16.llvm)

    return Mask16(bits), lower
