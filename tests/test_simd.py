"""The vector layer: arithmetic, conversions and lanes against numpy, on the processor that Numba compiles for.

A kernel here applies one primitive to arrays, sixteen lanes at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamatools.dtypes.simd import (
    LANE,
    F32x16,
    I8x16,
    I32x16,
    U8x16,
    U32x16,
    VectorConstant,
    bitcast,
    bits_of,
    clamp,
    convert,
    kernel,
    load,
    lookup,
    mask_of,
    maximum,
    minimum,
    reduce_max,
    reduce_min,
    rint,
    round_half_away,
    select,
    splat,
    sqrt,
    store,
)

Array = NDArray[Any]
N = 16 * 40


def floats(seed: int) -> NDArray[np.float32]:
    """Floats of every kind: both zeros, subnormals, halves, infinities, NaN, and random ones of every magnitude."""
    random = np.random.default_rng(seed)
    special = [0.0, -0.0, 1e-45, -1e-40, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, 8388607.5, 1e9, 3e38]
    special += [np.inf, -np.inf, np.nan]
    every = random.integers(0, 2**32, N // 4, np.uint32).view(np.float32)
    near = random.standard_normal(N - N // 4 - 4 * len(special), np.float32) * 10
    return random.permutation(np.concatenate([np.repeat(np.array(special, np.float32), 4), every, near]))


def integers(seed: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, N).astype(np.int32)


@kernel
def arithmetic(x: Array, y: Array, out: Array) -> None:
    for i in range(0, x.size, 16):
        a, b = load(F32x16, x, i), load(F32x16, y, i)
        store(out[0], i, a + b)
        store(out[1], i, a - b)
        store(out[2], i, a * b)
        store(out[3], i, a / b)
        store(out[4], i, a * b + a)  # rounds twice
        store(out[5], i, -a)
        store(out[6], i, abs(a))
        store(out[7], i, 1 / (a + 0.1))  # scalars take the lane type
        store(out[8], i, sqrt(abs(a)))
        store(out[9], i, rint(a))


def test_float_arithmetic() -> None:
    x, y, out = floats(1), floats(2), np.zeros((10, N), np.float32)
    arithmetic(x, y, out)
    with np.errstate(all="ignore"):
        third = np.float32(1) / (x + np.float32(0.1))
        expected = [x + y, x - y, x * y, x / y, x * y + x, -x, np.abs(x), third, np.sqrt(np.abs(x)), np.rint(x)]
    for row, want in zip(out, expected, strict=True):
        assert want.dtype == np.float32
        np.testing.assert_array_equal(row, want)
        number = ~np.isnan(want)
        np.testing.assert_array_equal(np.signbit(row)[number], np.signbit(want)[number])


@kernel
def choices(x: Array, y: Array, out: Array) -> None:
    for i in range(0, x.size, 16):
        a, b = load(F32x16, x, i), load(F32x16, y, i)
        store(out[0], i, select(a < b, a, b))
        store(out[1], i, select(a <= b, a, 7))
        store(out[2], i, select((a > b) & ~(a == 0.5), 1.5, b))
        store(out[3], i, select((a >= b) | (b != b), a, b))
        store(out[4], i, minimum(a, b))
        store(out[5], i, maximum(a, 0.5))
        store(out[6], i, clamp(a, -3, 4))


def test_comparisons_and_choices() -> None:
    x, y, out = floats(3), floats(4), np.zeros((7, N), np.float32)
    choices(x, y, out)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(out[0], np.where(x < y, x, y))
        np.testing.assert_array_equal(out[1], np.where(x <= y, x, 7))
        np.testing.assert_array_equal(out[2], np.where((x > y) & ~(x == 0.5), np.float32(1.5), y))
        np.testing.assert_array_equal(out[3], np.where((x >= y) | np.isnan(y), x, y))
        np.testing.assert_array_equal(out[4], np.where(x < y, x, y))
        np.testing.assert_array_equal(out[5], np.where(x > 0.5, x, np.float32(0.5)))
        np.testing.assert_array_equal(out[6], np.where(np.isnan(x), np.float32(-3), np.clip(x, -3, 4)))


@kernel
def zeros(x: Array, out: Array) -> None:
    for i in range(0, x.size, 16):
        a = load(F32x16, x, i)
        store(out[0], i, minimum(a, 0))
        store(out[1], i, minimum(a, -0.0))
        store(out[2], i, maximum(a, 0))
        store(out[3], i, maximum(a, -0.0))
        store(out[4], i, minimum(0, a))
        store(out[5], i, maximum(0, a))
        store(out[6], i, select(a < 0, 0, a))
        store(out[7], i, select(a > 0, -0.0, a))
        store(out[8], i, select(a <= 0, a, 0))
        store(out[9], i, select(a >= 0, a, -0.0))
        store(out[10], i, clamp(a, 0, 4))


def test_the_signs_of_zeros_are_those_of_c() -> None:
    """Where one of two is zero and known to be: a minimum of the processor's own could take the other zero."""
    x, out = floats(6), np.zeros((11, N), np.float32)
    zeros(x, out)
    plus, minus = np.float32([0.0, -0.0])
    with np.errstate(invalid="ignore"):
        expected = [
            np.where(x < 0, x, plus),
            np.where(x < 0, x, minus),
            np.where(x > 0, x, plus),
            np.where(x > 0, x, minus),
            np.where(x > 0, plus, x),
            np.where(x < 0, plus, x),
            np.where(x < 0, plus, x),
            np.where(x > 0, minus, x),
            np.where(x <= 0, x, plus),
            np.where(x >= 0, x, minus),
            np.where(x > 0, np.minimum(x, np.float32(4)), minus),
        ]
    for row, want in zip(out, expected, strict=True):
        assert want.dtype == np.float32
        np.testing.assert_array_equal(row, want)
        number = ~np.isnan(want)
        np.testing.assert_array_equal(np.signbit(row)[number], np.signbit(want)[number])


@kernel
def whole_numbers(x: Array, y: Array, out: Array) -> None:
    for i in range(0, x.size, 16):
        a, b = load(I32x16, x, i), load(I32x16, y, i)
        store(out[0], i, a + b)
        store(out[1], i, a - 3)
        store(out[2], i, a * b)
        store(out[3], i, a & b)
        store(out[4], i, a | 255)
        store(out[5], i, a ^ b)
        store(out[6], i, a << 4)
        store(out[7], i, a >> 4)  # keeps the sign
        store(out[8], i, bitcast(U32x16, a) >> 4)  # does not
        store(out[9], i, minimum(a, b))
        store(out[10], i, maximum(bitcast(U32x16, a), bitcast(U32x16, b)))
        store(out[11], i, select(a > b, a, b))


def test_integer_arithmetic() -> None:
    x, y, out = integers(1), integers(2), np.zeros((12, N), np.int32)
    whole_numbers(x, y, out)
    unsigned = [v.view(np.uint32) for v in (x, y)]
    with np.errstate(over="ignore"):
        expected = [x + y, x - np.int32(3), x * y, x & y, x | 255, x ^ y, x << 4, x >> 4]
    expected += [
        (unsigned[0] >> 4).view(np.int32),
        np.minimum(x, y),
        np.maximum(*unsigned).view(np.int32),
        np.maximum(x, y),
    ]
    for row, want in zip(out, expected, strict=True):
        np.testing.assert_array_equal(row, want)


@kernel
def roundings(x: Array, out: Array) -> None:
    for i in range(0, x.size, 16):
        store(out, i, round_half_away(load(F32x16, x, i)))


def test_round_half_away_is_the_c_librarys_roundf() -> None:
    nearly_half = np.float32([0.49999997, -0.49999997] * 8)
    x = np.concatenate([floats(5), np.arange(-320, 320, dtype=np.float32) / 2, nearly_half])
    out = np.zeros_like(x)
    roundings(x, out)
    wide = x.astype(np.float64)  # in which adding a half is exact
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(out, np.copysign(np.floor(np.abs(wide) + 0.5), wide).astype(np.float32))


@kernel
def conversions(x: Array, whole: Array, narrow: Array, floats: Array) -> None:
    for i in range(0, x.size, 16):
        a = convert(I32x16, clamp(load(F32x16, x, i), -300, 300))
        store(whole, i, a)
        store(narrow[0], i, convert(U8x16, a))
        store(narrow[1], i, convert(I8x16, a))
        store(floats[0], i, convert(F32x16, a))
        store(floats[1], i, convert(F32x16, convert(U8x16, a)))
        store(floats[2], i, convert(F32x16, convert(I8x16, a)))
        store(floats[3], i, convert(F32x16, convert(I32x16, convert(U8x16, a) >> 4)))
        store(floats[4], i, convert(F32x16, convert(I32x16, LANE * 2)))
        store(floats[5], i, splat(F32x16, x[i]))


def test_conversions_are_c_casts() -> None:
    x = np.random.default_rng(6).uniform(-400, 400, N).astype(np.float32)
    whole, narrow, out = np.zeros(N, np.int32), np.zeros((2, N), np.uint8), np.zeros((6, N), np.float32)
    conversions(x, whole, narrow, out)
    want = np.clip(x, -300, 300).astype(np.int32)
    as_bytes = want.astype(np.uint8)
    np.testing.assert_array_equal(whole, want)
    np.testing.assert_array_equal(narrow[0], as_bytes)
    np.testing.assert_array_equal(narrow[1], as_bytes)
    for row, expected in zip(
        out,
        [want, as_bytes, as_bytes.view(np.int8), as_bytes >> 4, np.arange(N) % 16 * 2, np.repeat(x[::16], 16)],
        strict=True,
    ):
        np.testing.assert_array_equal(row, expected.astype(np.float32))


TABLE: Any = VectorConstant(F32x16, np.arange(16) ** 2 - 100.5)


@kernel
def lookups(x: Array, out: Array) -> None:
    for i in range(0, x.size, 16):
        store(out, i, lookup(TABLE, load(I32x16, x, i)))


def test_lookup_takes_the_low_four_bits() -> None:
    x, out = integers(7), np.zeros(N, np.float32)
    lookups(x, out)
    np.testing.assert_array_equal(out, ((np.arange(16) ** 2 - 100.5)[x & 15]).astype(np.float32))


@kernel
def across(x: Array, extremes: Array, masks: Array, lanes: Array, bits: Array, chosen: Array) -> None:
    for i in range(0, x.size, 16):
        a = load(F32x16, x, i)
        extremes[0, i // 16] = reduce_min(a)
        extremes[1, i // 16] = reduce_max(a)
        masks[i // 16] = bits_of(a > 0)
        lanes[0, i // 16] = a[5]
        lanes[1, i // 16] = a[i // 16 % 16]
        store(chosen, i, select(mask_of(bits[i // 16]), 3, -1))


def test_reductions_masks_and_lanes() -> None:
    x = np.random.default_rng(8).standard_normal(N, np.float32)
    groups = x.reshape(-1, 16)
    n = len(groups)
    extremes, masks, lanes = np.zeros((2, n), np.float32), np.zeros(n, np.uint32), np.zeros((2, n), np.float32)
    bits, chosen = np.random.default_rng(9).integers(0, 65536, n).astype(np.uint32), np.zeros(N, np.int32)
    across(x, extremes, masks, lanes, bits, chosen)
    np.testing.assert_array_equal(extremes, [groups.min(1), groups.max(1)])
    np.testing.assert_array_equal(masks, ((groups > 0) << np.arange(16)).sum(1))
    np.testing.assert_array_equal(lanes, [groups[:, 5], groups[np.arange(n), np.arange(n) % 16]])
    np.testing.assert_array_equal(chosen.reshape(n, 16), np.where(bits[:, None] >> np.arange(16) & 1, 3, -1))
