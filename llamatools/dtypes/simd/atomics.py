"""What kernels that run at the same time need: atomic int64, a pause, and a call to a kernel by its address."""

from __future__ import annotations

import os
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .memory import address

I64 = ir.IntType(64)


@intrinsic
def atomic_load(typing: Any, array: Any, index: Any) -> Any:
    """array[index] as of now; what was written before it was stored is visible then."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.load_atomic(address(context, builder, array, args[0], args[1], I64), "acquire", 8)

    return types.int64(array, types.intp), lower


@intrinsic
def atomic_store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value, after all that was written before."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.store_atomic(args[2], address(context, builder, array, args[0], args[1], I64), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), lower


@intrinsic
def atomic_add(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Adds to array[index] and returns what it was before."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", address(context, builder, array, args[0], args[1], I64), args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), lower


@intrinsic
def pause(typing: Any) -> Any:
    """Some ten nanoseconds in which the processor does as little as it can."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        triple = context.codegen().magic_tuple()[0]
        if triple.startswith("x86_64"):
            _external(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif triple.startswith(("aarch64", "arm64")):
            builder.call(_declared(builder, "llvm.aarch64.hint", ir.VoidType(), ir.IntType(32)), [ir.IntType(32)(1)])
        return context.get_dummy_value()

    return types.void(), lower


@intrinsic
def give_way(typing: Any) -> Any:
    """Lets another thread have this processor, if one waits for it."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if hasattr(os, "sched_yield"):
            _external(builder, "sched_yield", ir.IntType(32))
        return context.get_dummy_value()

    return types.void(), lower


@intrinsic
def call_kernel(typing: Any, function: Any, job: Any, start: Any, stop: Any) -> Any:
    """call_kernel(address, job, start, stop): calls the kernel of three integers whose machine code is there."""
    kinds = (types.intp,) * 3

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        kind = context.call_conv.get_function_type(types.none, kinds)
        kernel = builder.inttoptr(args[0], kind.as_pointer())
        context.call_conv.call_function(builder, kernel, types.none, kinds, args[1:])  # kernels raise nothing
        return context.get_dummy_value()

    return types.void(types.intp, *kinds), lower


def _declared(builder: ir.IRBuilder, name: str, returns: ir.Type, *kinds: ir.Type) -> ir.Value:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(returns, kinds), name)


def _external(builder: ir.IRBuilder, name: str, returns: ir.Type) -> None:
    builder.call(_declared(builder, name, returns), [])
