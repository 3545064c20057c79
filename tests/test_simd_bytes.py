"""The vector layer: bytes and their dot products against numpy, as test_simd.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamatools.dtypes.simd import (
    LANE,
    F32x4,
    F32x16,
    I8x16,
    I8x64,
    I32x16,
    U8x16,
    U8x32,
    U8x64,
    U32x16,
    VectorConstant,
    address_of,
    array_at,
    bits_as_bytes,
    bytes_twice,
    dot,
    dot_tokens,
    dot_two,
    joined,
    kernel,
    load,
    load_columns,
    load_halves,
    lookup_bytes,
    prefetch,
    reduce_add,
    scratch,
    splat,
    spread,
    store,
)

Array = NDArray[Any]
LEAST, MOST = -127, 127  # of activations


def activations(n: int) -> Array:
    """Random bytes, and runs of the least and the largest, whose products come nearest to an overflow."""
    x = np.random.default_rng(n).integers(LEAST, MOST + 1, n).astype(np.int8)
    x[: n // 8], x[n // 8 : n // 4] = MOST, LEAST
    return x


@kernel
def dots(codes: Array, signed_codes: Array, x: Array, out: Array) -> None:
    for i in range(0, x.size, 64):
        a, b = load(I8x64, x, i), load(I8x64, x, x.size - 64 - i)
        store(out[0], i // 4, dot(load(U8x64, codes, i), a))
        store(out[1], i // 4, dot(load(I8x64, signed_codes, i), a))
        fours = load(U8x64, codes, i) & 15
        store(out[2], i // 4, dot_two(fours, a, 15 - fours, b, 15))
        store(out[3], i // 4, dot_two(load(I8x64, signed_codes, i), a, load(I8x64, signed_codes, i), b, 127))


def test_dot_products() -> None:
    x = activations(64 * 32)
    draws = np.random.default_rng(10)
    codes, signed = draws.integers(0, 128, x.size).astype(np.uint8), draws.integers(-128, 128, x.size).astype(np.int8)
    codes[: x.size // 4], signed[: x.size // 4] = 127, -128
    out = np.zeros((4, x.size // 4), np.int32)
    dots(codes, signed, x, out)
    other = x.reshape(-1, 64)[::-1].reshape(-1)
    fours = codes.astype(int) & 15
    wanted = [codes.astype(int) * x, signed.astype(int) * x]
    wanted += [fours * x + (15 - fours) * other, signed.astype(int) * x + signed.astype(int) * other]
    for row, products in zip(out, wanted, strict=True):
        np.testing.assert_array_equal(row, products.reshape(-1, 4).sum(1))


@kernel
def dots_of_tokens(codes: Array, signed_codes: Array, x: Array, out: Array) -> None:
    """codes: (3 kinds, 8 steps, 64), flat; x: (4 tokens, 40 bytes); out: (4 kinds, 4 tokens, 16)."""
    steps, signed_steps = scratch(U8x64, 24), scratch(I8x64, 8)
    for c in range(24):
        steps[c] = load(U8x64, codes, 64 * c)
    for c in range(8):
        signed_steps[c] = load(I8x64, signed_codes, 64 * c)
    a = dot_tokens(steps, 0, 8, 15, x, 3, 40, 4)
    b = dot_tokens(steps, 8, 8, 63, x, 3, 40, 4)
    c = dot_tokens(steps, 16, 4, 127, x, 3, 40, 4)
    d = dot_tokens(signed_steps, 0, 8, 127, x, 3, 40, 4)
    for t in range(4):
        store(out[0], 16 * t, a[t])
        store(out[1], 16 * t, b[t])
        store(out[2], 16 * t, c[t])
        store(out[3], 16 * t, d[t])


@pytest.mark.parametrize("largest", [False, True])
def test_dot_products_of_rows_and_tokens(largest: bool) -> None:
    draws = np.random.default_rng(11)
    codes = np.stack([draws.integers(0, most + 1, (8, 16, 4)) for most in (15, 63, 127)])
    signed = draws.integers(-128, 128, (8, 16, 4))
    x = activations(160).reshape(4, 40)
    if largest:
        codes[:] = np.array([15, 63, 127])[:, None, None, None]
        signed[:], x[:] = -128, MOST
    out = np.zeros((4, 64), np.int32)
    dots_of_tokens(codes.astype(np.uint8).reshape(-1), signed.astype(np.int8).reshape(-1), x.reshape(-1), out)
    steps = x[:, 3:35].astype(int).reshape(4, 8, 4)
    for row, (code, n) in zip(out, ((codes[0], 8), (codes[1], 8), (codes[2], 4), (signed, 8)), strict=True):
        np.testing.assert_array_equal(row.reshape(4, 16), np.einsum("crk,tck->tr", code[:n], steps[:, :n]))


@kernel
def arrangements(x: Array, halves: Array, bytes_out: Array, words: Array, floats: Array) -> None:
    low, high = load(U8x16, x, 0), load(U8x16, x, 16)
    store(bytes_out, 0, joined(joined(low, high), load(U8x32, x, 32)))
    store(bytes_out, 64, lookup_bytes(BYTES, load(U8x64, x, 0) & 15))
    store(bytes_out, 128, bits_as_bytes(0xFEDC_BA98_0000_4321))
    columns = scratch(U32x16, 6)
    load_columns(x, LANE * 50, 7, columns, 2)
    for c in range(4):
        store(words[c], 0, columns[2 + c])
    store(words[4], 0, spread(load(I32x16, words[0], 0), 2))
    store(words[5], 0, bytes_twice(0x04030201, 0xFFFEFDFC))
    store(floats, 0, spread(load_halves(halves, 3, 0, 7, 2), 0))
    store(floats, 16, splat(F32x16, reduce_add(load(F32x16, floats, 32))))
    store(array_at(F32x4, address_of(floats)), 48, load(F32x4, floats, 32))
    prefetch(x, 1 << 20)


BYTES: Any = VectorConstant(I8x16, np.arange(16) * 17 - 128)


def test_arrangements_of_bytes() -> None:
    draws = np.random.default_rng(12)
    x, halves = draws.integers(0, 256, 1000, np.uint8), draws.standard_normal(8).astype(np.float16)
    bytes_out, words, numbers = np.zeros(192, np.uint8), np.zeros((6, 16), np.uint32), np.zeros(64, np.float32)
    numbers[32:48] = values = draws.standard_normal(16).astype(np.float32)
    arrangements(x, halves.view(np.uint16), bytes_out, words, numbers)
    np.testing.assert_array_equal(bytes_out[:64], x[:64])
    np.testing.assert_array_equal(bytes_out[64:128].view(np.int8), (np.arange(16) * 17 - 128)[x[:64] & 15])
    np.testing.assert_array_equal(bytes_out[128:], [0xFEDC_BA98_0000_4321 >> k & 1 for k in range(64)])
    rows = np.stack([x[50 * r + 7 : 50 * r + 23].view("<u4") for r in range(16)])
    np.testing.assert_array_equal(words[:4], rows.T)
    np.testing.assert_array_equal(words[4], np.repeat(words[0][8:12], 4))
    np.testing.assert_array_equal(words[5], np.repeat([1, 2, 3, 4, 0xFC, 0xFD, 0xFE, 0xFF], 2))
    np.testing.assert_array_equal(numbers[:16], np.repeat(halves[[3, 0, 7, 2]].astype(np.float32), 4))
    sums = values
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    np.testing.assert_array_equal(numbers[16:32], sums.repeat(16))
    np.testing.assert_array_equal(numbers[48:52], values[:4])
