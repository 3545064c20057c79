"""Explicit SIMD for Numba: LLVM vector values as ordinary variables of compiled functions, no C toolchain.

A vector has a fixed number of lanes and LLVM splits it over whatever registers the processor has: sixteen floats are
one AVX-512, two AVX2 or four NEON registers. So a kernel is written once, for sixteen lanes, and gives the same bits on
every processor: arithmetic is IEEE 754's, one rounding per operation, in the order written. There are no fast-math
flags and no fused multiply-add anywhere in this layer.

Importing this package imports Numba, which takes a moment: only modules of kernels do. See docs/kernels.md.
"""

from __future__ import annotations

from .dot import bits_as_bytes, bytes_twice, dot, dot_tokens, dot_two, joined, load_columns, lookup_bytes, spread
from .functions import (
    bitcast,
    bits_of,
    clamp,
    convert,
    lookup,
    mask_of,
    maximum,
    minimum,
    multiply_add,
    reduce_add,
    reduce_max,
    reduce_min,
    rint,
    round_half_away,
    select,
    splat,
    sqrt,
)
from .half import float_to_half, half_to_float, load_half, load_halves, store_half
from .kernel import inlined, kernel
from .memory import (
    address_of,
    array_at,
    lane,
    lanes_of,
    load,
    prefetch,
    scratch,
    set_lane,
    store,
)
from .targets import apply_forced_target
from .tiles import load_transposed, maxima, minima, store_transposed, totals
from .vectors import (
    LANE,
    F32x4,
    F32x16,
    I8x16,
    I8x64,
    I32x4,
    I32x16,
    I64x16,
    Mask16,
    U8x16,
    U8x32,
    U8x64,
    U16x16,
    U32x4,
    U32x16,
    Vector,
    VectorConstant,
)

__all__ = [
    "LANE",
    "F32x4",
    "F32x16",
    "I8x16",
    "I8x64",
    "I32x4",
    "I32x16",
    "I64x16",
    "Mask16",
    "U8x16",
    "U8x32",
    "U8x64",
    "U16x16",
    "U32x4",
    "U32x16",
    "Vector",
    "VectorConstant",
    "address_of",
    "array_at",
    "bitcast",
    "bits_as_bytes",
    "bits_of",
    "bytes_twice",
    "clamp",
    "convert",
    "dot",
    "dot_tokens",
    "dot_two",
    "float_to_half",
    "half_to_float",
    "inlined",
    "joined",
    "kernel",
    "lane",
    "lanes_of",
    "load",
    "load_columns",
    "load_half",
    "load_halves",
    "load_transposed",
    "lookup",
    "lookup_bytes",
    "mask_of",
    "maxima",
    "maximum",
    "minima",
    "minimum",
    "multiply_add",
    "prefetch",
    "reduce_add",
    "reduce_max",
    "reduce_min",
    "rint",
    "round_half_away",
    "scratch",
    "select",
    "set_lane",
    "splat",
    "spread",
    "sqrt",
    "store",
    "store_half",
    "store_transposed",
    "totals",
]

apply_forced_target()  # before the first kernel makes Numba choose
