"""Dot products of bytes: codes of weights by activations in eight bits, exact in 32-bit integers on every processor.

Codes are U8x64, of at most 127, or I8x64; activations are I8x64, from -127 to 127. Four neighbouring products add up to
one lane of an I32x16, by the instruction that the target has for it:

    vnni     vpdpbusd: a lane at once
    avx2     vpmaddubsw, which adds two products in 16 bits, then vpmaddwd, which adds two of these sums
    sdot     arm64's: a lane at once
    others   the sums of avx2 by shifts and products in 16 bits

Nothing can overflow: two products are at most 2 * 128 * 127 < 2^15. Where codes are small, sums of several products are
added up in 16 bits before they become 32: `most` says how large codes are.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, errors, types
from numba.extending import intrinsic

from .functions import call, joined_all, part
from .memory import Scratch, address, load_unaligned
from .targets import features
from .tiles import transposed
from .vectors import INDEX, F32x16, I8x16, I8x64, I32x16, U8x16, U8x32, U8x64, U32x16, Vector, broadcast

I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
ACTIVATION = 127  # the largest

_DOUBLE = {U8x16: U8x32, U8x32: U8x64}


@intrinsic
def joined(typing: Any, a: Any, b: Any) -> Any:
    """The lanes of a, then those of b: two U8x16 or two U8x32."""
    if a is not b or a not in _DOUBLE:
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return joined_all(builder, list(args))

    return _DOUBLE[a](a, b), lower


@intrinsic(prefer_literal=True)
def spread(typing: Any, vector: Any, n: Any) -> Any:
    """spread(v, n): lanes 4 n to 4 n + 3, each four times, as sixteen. n: a literal, 0 where v has four lanes."""
    if not isinstance(n, types.IntegerLiteral):
        raise errors.RequireLiteralValue("which lanes to spread must be a literal")
    which = [4 * n.literal_value + k // 4 for k in range(16)]
    wide = F32x16 if vector.is_float else I32x16

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        lanes = ir.Constant(ir.VectorType(INDEX, 16), which)
        return builder.shuffle_vector(args[0], ir.Constant(args[0].type, ir.Undefined), lanes)

    return wide(vector, n), lower


@intrinsic
def bytes_twice(typing: Any, low: Any, high: Any) -> Any:
    """The four bytes of the number `low`, then those of `high`, from the least on, each twice: an I32x16."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        both = ir.Constant(ir.VectorType(I32, 2), ir.Undefined)
        for k, number in enumerate(args):
            both = builder.insert_element(both, number, ir.Constant(INDEX, k))
        eight = builder.bitcast(both, ir.VectorType(I8, 8))
        which = ir.Constant(ir.VectorType(INDEX, 16), [k // 2 for k in range(16)])
        sixteen = builder.shuffle_vector(eight, ir.Constant(eight.type, ir.Undefined), which)
        return builder.zext(sixteen, I32x16.llvm)

    return I32x16(types.uint32, types.uint32), lower


@intrinsic
def bits_as_bytes(typing: Any, bits: Any) -> Any:
    """The 64 bits of a number, each as a byte, 0 or 1, from the least on: a U8x64."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.zext(builder.bitcast(args[0], ir.VectorType(ir.IntType(1), 64)), U8x64.llvm)

    return U8x64(types.uint64), lower


@intrinsic
def lookup_bytes(typing: Any, table: Any, index: Any) -> Any:
    """table[index] per lane: sixteen I8x16, looked up by codes, U8x64, below 16."""
    if table is not I8x16 or index is not U8x64:
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if "avx2" in features():
            tables = joined_all(builder, [args[0]] * 2)
            runs = [part(builder, args[1], k, 32) for k in range(2)]
            found = [call(builder, "llvm.x86.avx2.pshuf.b", run.type, tables, run) for run in runs]
        elif "neon" in features():
            runs = [part(builder, args[1], k, 16) for k in range(4)]
            found = [call(builder, "llvm.aarch64.neon.tbl1.v16i8", run.type, args[0], run) for run in runs]
        else:
            found = [_chosen(builder, args[0], args[1])]
        return joined_all(builder, found)

    return I8x64(table, index), lower


def _chosen(builder: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    """A tree of choices, one level per bit of the index."""
    level = [broadcast(builder, builder.extract_element(table, ir.Constant(INDEX, k)), 64) for k in range(16)]
    for bit in (1, 2, 4, 8):
        masked = builder.and_(index, _filled(index.type, bit))
        is_set = builder.icmp_unsigned("!=", masked, _filled(index.type, 0))
        level = [builder.select(is_set, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
    return level[0]


@intrinsic
def load_columns(typing: Any, array: Any, starts: Any, offset: Any, into: Any, first: Any) -> Any:
    """load_columns(array, starts, offset, columns, first): sixteen bytes of sixteen rows, transposed.

    Lane r of columns[first + c], c < 4, is bytes 4 c to 4 c + 3 from array[starts[r] + offset] on. starts: I64x16;
    columns: scratch of U32x16.
    """
    if not isinstance(into, Scratch) or into.vector is not U32x16:
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        rows = []
        for r in range(16):
            start = builder.add(builder.extract_element(args[1], ir.Constant(INDEX, r)), args[2])
            pointer = address(context, builder, array, args[0], start, ir.VectorType(I32, 4))
            rows.append(load_unaligned(builder, pointer))
        # Two rows, four apart, in a vector: then numbers move within its halves only, for which AVX2 has instructions.
        pairs = [joined_all(builder, [rows[r], rows[r + 4]]) for r in (0, 1, 2, 3, 8, 9, 10, 11)]
        halves = [transposed(builder, pairs[:4]), transposed(builder, pairs[4:])]
        for c, column in enumerate(zip(*halves, strict=True)):
            place = builder.gep(args[3], [builder.add(args[4], ir.Constant(args[4].type, c))])
            builder.store(joined_all(builder, list(column)), place)
        return context.get_dummy_value()

    return types.void(array, starts, types.intp, into, types.intp), lower


@intrinsic
def dot(typing: Any, codes: Any, x: Any) -> Any:
    """Lane k: the sum of the products of bytes 4 k to 4 k + 3. codes: U8x64 or I8x64; x: I8x64."""
    if codes not in (U8x64, I8x64) or x is not I8x64:
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        (found,) = _sums_of_dots(builder, [(args[0], [args[1]])], 127, codes)
        return found

    return I32x16(codes, x), lower


@intrinsic(prefer_literal=True)
def dot_two(typing: Any, codes: Any, x: Any, other_codes: Any, other_x: Any, most: Any) -> Any:
    """dot(codes, x) + dot(other_codes, other_x), where codes are at most `most`, a literal."""
    if not isinstance(most, types.IntegerLiteral):
        raise errors.RequireLiteralValue("the largest code must be a literal")

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        steps = [(args[0], [args[1]]), (args[2], [args[3]])]
        (found,) = _sums_of_dots(builder, steps, most.literal_value, codes)
        return found

    return I32x16(codes, x, codes, x, most), lower


@intrinsic(prefer_literal=True)
def dot_tokens(
    typing: Any, codes: Any, first: Any, n: Any, most: Any, x: Any, index: Any, apart: Any, n_tokens: Any
) -> Any:
    """dot_tokens(codes, first, n, most, x, index, apart, n_tokens): sixteen rows by tokens, an I32x16 for each.

    Lane r of codes[first + c], c < n, is four codes of row r, which are multiplied by the four activations from
    x[index + 4 c + apart * t] on, for t < n_tokens, and added up over all c. codes: scratch of U8x64 or I8x64, of at
    most `most`; x: an array of int8. n, most and n_tokens are literals.
    """
    if not all(isinstance(argument, types.IntegerLiteral) for argument in (n, most, n_tokens)):
        raise errors.RequireLiteralValue("the numbers of codes and tokens and the largest code must be literals")
    if not isinstance(codes, Scratch):
        return None

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        def activations(c: int, t: int) -> ir.Value:
            at = builder.add(args[5], ir.Constant(args[5].type, 4 * c))
            at = builder.add(at, builder.mul(args[6], ir.Constant(args[6].type, t)))
            four = load_unaligned(builder, address(context, builder, x, args[4], at, I32))
            return builder.bitcast(broadcast(builder, four, 16), I8x64.llvm)

        steps = []
        for c in range(n.literal_value):
            place = builder.gep(args[0], [builder.add(args[1], ir.Constant(args[1].type, c))])
            steps.append((builder.load(place), [activations(c, t) for t in range(n_tokens.literal_value)]))
        sums = _sums_of_dots(builder, steps, most.literal_value, codes.vector)
        return cgutils.pack_array(builder, sums)

    sums = types.UniTuple(I32x16, n_tokens.literal_value)
    return sums(codes, types.intp, n, most, x, types.intp, types.intp, n_tokens), lower


Steps = list[tuple[ir.Value, list[ir.Value]]]  # codes, and the activations of each token that they are multiplied by


def _sums_of_dots(builder: ir.IRBuilder, steps: Steps, most: int, codes: Vector) -> list[ir.Value]:
    """Per token, the sum over all steps of lanes of four products each."""
    available = features()
    if "vnni" in available:
        return _at_once(builder, steps, codes, 64, "llvm.x86.avx512.vpdpbusd.512")
    if "sdot" in available:
        return _at_once(builder, steps, codes, 16, "llvm.aarch64.neon.sdot.v4i32.v16i8")
    return _by_pairs(builder, steps, most, codes, 32 if "avx2" in available else 64)


def _at_once(builder: ir.IRBuilder, steps: Steps, codes: Vector, width: int, name: str) -> list[ir.Value]:
    """By an instruction that adds four products to a lane."""
    sums = [[_filled(ir.VectorType(I32, width // 4), 0)] * (64 // width) for _ in steps[0][1]]
    for code, tokens in steps:
        for t, x in enumerate(tokens):
            for k in range(64 // width):
                a, b = part(builder, code, k, width), part(builder, x, k, width)
                if codes is I8x64 and width == 64:  # sdot takes signed codes as they are
                    a, b = _with_codes_positive(builder, a, b)
                sums[t][k] = call(builder, name, sums[t][k].type, sums[t][k], a, b)
    return [joined_all(builder, parts) for parts in sums]


def _by_pairs(builder: ir.IRBuilder, steps: Steps, most: int, codes: Vector, width: int) -> list[ir.Value]:
    """By sums of two products in 16 bits, as many of which are added up as fit."""
    runs = 64 // width
    totals: list[list[ir.Value | None]] = [[None] * runs for _ in steps[0][1]]
    fit = max(1, (2**15 - 1) // (2 * ACTIVATION * most))
    for start in range(0, len(steps), fit):
        sums: list[list[ir.Value | None]] = [[None] * runs for _ in steps[0][1]]
        for code, tokens in steps[start : start + fit]:
            parts = [part(builder, code, k, width) for k in range(runs)]
            for t, x in enumerate(tokens):
                for k in range(runs):
                    a, b = parts[k], part(builder, x, k, width)
                    if codes is I8x64:
                        a, b = _with_codes_positive(builder, a, b)
                    sums[t][k] = _added(builder, sums[t][k], _pairs(builder, a, b))
        for total, sum_ in zip(totals, sums, strict=True):
            for k in range(runs):
                total[k] = _added(builder, total[k], _widened(builder, sum_[k]))
    return [joined_all(builder, parts) for parts in totals]


def _added(builder: ir.IRBuilder, total: ir.Value | None, value: ir.Value) -> ir.Value:
    return value if total is None else builder.add(total, value)


def _with_codes_positive(builder: ir.IRBuilder, codes: ir.Value, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """|codes|, and x with its sign turned where a code is negative: the same products. -128 becomes 128, unsigned."""
    zero = _filled(codes.type, 0)
    is_negative = builder.icmp_signed("<", codes, zero)
    positive = builder.select(is_negative, builder.sub(zero, codes), codes)
    if codes.type.count == 32:
        return positive, call(builder, "llvm.x86.avx2.psign.b", x.type, x, codes)
    return positive, builder.select(is_negative, builder.sub(zero, x), x)


def _pairs(builder: ir.IRBuilder, codes: ir.Value, x: ir.Value) -> ir.Value:
    """Lane k, 16 bits: codes[2 k] * x[2 k] + codes[2 k + 1] * x[2 k + 1]."""
    wide = ir.VectorType(I16, codes.type.count // 2)
    if codes.type.count == 32:
        return call(builder, "llvm.x86.avx2.pmadd.ub.sw", wide, codes, x)
    both_codes, both_x, byte = builder.bitcast(codes, wide), builder.bitcast(x, wide), _filled(wide, 8)
    even = builder.mul(builder.and_(both_codes, _filled(wide, 255)), builder.ashr(builder.shl(both_x, byte), byte))
    return builder.add(even, builder.mul(builder.lshr(both_codes, byte), builder.ashr(both_x, byte)))


def _widened(builder: ir.IRBuilder, pairs: ir.Value) -> ir.Value:
    """Lane k, 32 bits: pairs[2 k] + pairs[2 k + 1]."""
    wide = ir.VectorType(I32, pairs.type.count // 2)
    if pairs.type.count == 16:
        return call(builder, "llvm.x86.avx2.pmadd.wd", wide, pairs, _filled(pairs.type, 1))
    both, half = builder.bitcast(pairs, wide), _filled(wide, 16)
    return builder.add(builder.ashr(builder.shl(both, half), half), builder.ashr(both, half))


def _filled(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)
