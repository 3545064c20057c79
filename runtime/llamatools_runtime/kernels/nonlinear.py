"""IQ4_NL and IQ4_XS: codes are looked up in a table of signed bytes (layouts: llamatools/dtypes/nonlinear.py)."""

from __future__ import annotations

from typing import Any

import numpy as np

from llamatools.dtypes import nonlinear
from llamatools.dtypes.kernels.layouts import offsets
from llamatools.dtypes.simd import (
    F32x16,
    I8x16,
    I8x64,
    I32x16,
    I64x16,
    U8x16,
    U8x64,
    U32x4,
    VectorConstant,
    array_at,
    bitcast,
    bytes_twice,
    convert,
    inlined,
    joined,
    kernel,
    load,
    load_columns,
    load_half,
    lookup_bytes,
    prefetch,
    reduce_add,
    scratch,
    splat,
)

from .job import BLOCKS, N_IN, SCALES, Y
from .k_quants import scaled
from .legacy import low_halves, nibbles
from .rows import AHEAD, rows_by_vector
from .tile import accumulate, tiles_by_tokens

IQ4_NL, IQ4_XS, _ = (offsets(dtype) for dtype in nonlinear.TABLE)
VALUES: Any = VectorConstant(I8x16, nonlinear.IQ4_VALUES)
u32 = np.uint32


# ---- one token


@inlined
def _iq4_nl(blocks: Any, p0: int, p1: int, p2: int, p3: int) -> tuple[Any, Any]:
    first, second = nibbles(blocks, p0 + IQ4_NL.qs, p1 + IQ4_NL.qs, p2 + IQ4_NL.qs, p3 + IQ4_NL.qs)
    return lookup_bytes(VALUES, first), lookup_bytes(VALUES, second)


@kernel
def iq4_nl_by_vector(job: int, start: int, stop: int) -> None:
    rows_by_vector(job, start, stop, _iq4_nl, IQ4_NL.nbytes, 0, 127, False)


@inlined
def _iq4_xs(blocks: Any, p: int, c: int) -> Any:
    """The values of weights 64 c to 64 c + 63 of the block at p, but for their scales."""
    one = load(U8x16, blocks, p + IQ4_XS.qs + 32 * c)
    two = load(U8x16, blocks, p + IQ4_XS.qs + 32 * c + 16)
    return lookup_bytes(VALUES, joined(joined(one & 15, one >> 4), joined(two & 15, two >> 4)))


@inlined
def _iq4_xs_scales(blocks: Any, p: int) -> Any:
    """Of every sixteen weights, from -32 to 31."""
    header = load(U32x4, blocks, p)
    low, high = header[1], header[0] >> u32(16)
    first = _nibbles_as_bytes(low & u32(0xFFFF)) | _pairs_as_bytes(high & u32(0xFF)) << u32(4)
    last = _nibbles_as_bytes(low >> u32(16)) | _pairs_as_bytes(high >> u32(8)) << u32(4)
    return bytes_twice(first, last) - 32


@inlined
def _nibbles_as_bytes(bits: Any) -> Any:
    """Four times four bits, each in a byte of its own."""
    apart = (bits | bits << u32(8)) & u32(0x00FF00FF)
    return (apart | apart << u32(4)) & u32(0x0F0F0F0F)


@inlined
def _pairs_as_bytes(bits: Any) -> Any:
    """Four times two bits, each in a byte of its own."""
    apart = (bits | bits << u32(12)) & u32(0x000F000F)
    return (apart | apart << u32(6)) & u32(0x03030303)


@kernel
def iq4_xs_by_vector(job: int, start: int, stop: int) -> None:
    fields = array_at(I64x16, job)
    blocks, y, n_blocks = array_at(U8x16, fields[BLOCKS]), array_at(F32x16, fields[Y]), fields[N_IN] // 256
    d = array_at(F32x16, fields[SCALES])
    for row in range(start, stop):
        total = splat(F32x16, 0)
        for b in range(n_blocks):
            p = (row * n_blocks + b) * IQ4_XS.nbytes
            for line in range(0, IQ4_XS.nbytes, 64):
                prefetch(blocks, p + AHEAD + line)
            scales = _iq4_xs_scales(blocks, p)
            product = scaled(fields, _iq4_xs(blocks, p, 0), b, scales, 0)
            product = product + scaled(fields, _iq4_xs(blocks, p, 1), b, scales, 1)
            product = product + scaled(fields, _iq4_xs(blocks, p, 2), b, scales, 2)
            product = product + scaled(fields, _iq4_xs(blocks, p, 3), b, scales, 3)
            total = total + convert(F32x16, product) * (load_half(blocks, p) * d[8 * b])
        y[row] = reduce_add(total)


# ---- many tokens


@inlined
def _unpack_values(blocks: Any, starts: Any, offset: int, columns: Any, codes: Any, first: int) -> None:
    """Sixteen bytes of each row, as eight vectors of values from codes[first] on."""
    load_columns(blocks, starts, offset, columns, 0)
    for c in range(4):
        both = bitcast(U8x64, columns[c])
        codes[first + c] = lookup_bytes(VALUES, both & 15)
        codes[first + 4 + c] = lookup_bytes(VALUES, both >> 4)


@inlined
def _unpack_iq4_nl(blocks: Any, starts: Any, n: int, columns: Any, codes: Any, scales: Any, minima: Any) -> None:
    for i in range(n):
        load_columns(blocks, starts, i * IQ4_NL.nbytes, columns, 0)
        scales[i] = low_halves(columns[0])
        _unpack_values(blocks, starts, i * IQ4_NL.nbytes + IQ4_NL.qs, columns, codes, 8 * i)


@inlined
def _unpack_iq4_xs(blocks: Any, starts: Any, n: int, columns: Any, codes: Any, scales: Any, minima: Any) -> None:
    load_columns(blocks, starts, 0, columns, 0)
    d, high, low = low_halves(columns[0]), columns[0] >> 16, columns[1]
    for j in range(8):
        scale = low >> (4 * j) & 15 | (high >> (2 * j) & 3) << 4
        scales[j] = d * convert(F32x16, bitcast(I32x16, scale) - 32)
    for j in range(8):
        _unpack_values(blocks, starts, IQ4_XS.qs + 16 * j, columns, codes, 8 * j)


@inlined
def _accumulate(
    codes: Any, scales: Any, minima: Any, n: int, fields: Any, b: int, first: int, n_tokens: int, totals: Any
) -> None:
    accumulate(codes, scales, 0, 127, n, fields, b, first, n_tokens, totals)


@kernel
def iq4_nl_by_tokens(job: int, start: int, stop: int) -> None:
    codes = scratch(I8x64, 64)
    tiles_by_tokens(job, start, stop, _unpack_iq4_nl, _accumulate, codes, IQ4_NL.nbytes, 1)


@kernel
def iq4_xs_by_tokens(job: int, start: int, stop: int) -> None:
    codes = scratch(I8x64, 64)
    tiles_by_tokens(job, start, stop, _unpack_iq4_xs, _accumulate, codes, IQ4_XS.nbytes, 8)
