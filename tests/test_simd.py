"""The vector layer: each primitive against numpy, on the processor that Numba compiles for.

A kernel here applies one primitive to arrays, sixteen lanes at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamatools.dtypes import compiled
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
    U16x16,
    U32x16,
    VectorConstant,
    address_of,
    array_at,
    bitcast,
    bits_as_bytes,
    bits_of,
    bytes_twice,
    clamp,
    convert,
    dot,
    dot_tokens,
    dot_two,
    float_to_half,
    half_to_float,
    joined,
    kernel,
    lane,
    load,
    load_columns,
    load_half,
    load_halves,
    load_transposed,
    lookup,
    lookup_bytes,
    mask_of,
    maxima,
    maximum,
    minima,
    minimum,
    prefetch,
    reduce_add,
    reduce_max,
    reduce_min,
    rint,
    round_half_away,
    scratch,
    select,
    set_lane,
    splat,
    spread,
    sqrt,
    store,
    store_half,
    totals,
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


@kernel
def transpositions(x: Array, stride: int, out: Array) -> None:
    tile = scratch(F32x16, 32)
    starts = minimum(LANE, 13) * stride // 3
    load_transposed(x, starts, tile, 0)
    load_transposed(x, starts, tile, 16)
    for k in range(32):
        tile[k] = tile[k] + 1
    for k in range(32):
        store(out, 16 * k, tile[k])


def test_transposed_loads_and_scratch() -> None:
    x, out = np.arange(2000, dtype=np.float32), np.zeros(32 * 16, np.float32)
    transpositions(x, 100, out)
    starts = np.minimum(np.arange(16), 13) * 100 // 3
    np.testing.assert_array_equal(out.reshape(32, 16), x[starts[None, :] + np.arange(32)[:, None]] + 1)


@kernel
def of_each(x: Array, out: Array) -> None:
    tile = scratch(F32x16, 16)
    for k in range(16):
        tile[k] = load(F32x16, x, 16 * k)
    store(out, 0, minima(tile))
    store(out, 16, maxima(tile))
    store(out, 32, totals(tile))


def test_sixteen_vectors_are_reduced_at_once() -> None:
    x, out = np.random.default_rng(10).standard_normal(256, np.float32), np.zeros(48, np.float32)
    of_each(x, out)
    rows = sums = x.reshape(16, 16)
    while sums.shape[1] > 1:
        sums = sums[:, ::2] + sums[:, 1::2]
    np.testing.assert_array_equal(out.reshape(3, 16), [rows.min(1), rows.max(1), sums[:, 0]])


@kernel
def halves_to_floats(halves: Array, floats: Array, one_by_one: Array) -> None:
    for i in range(0, halves.size, 16):
        store(floats, i, half_to_float(load(U16x16, halves, i)))
    for i in range(halves.size):
        one_by_one[i] = load_half(halves, i)


def test_every_half_becomes_its_float() -> None:
    halves = np.arange(65536, dtype=np.uint16)
    out = np.zeros((2, 65536), np.float32)
    halves_to_floats(halves, out[0], out[1])
    want = halves.view(np.float16).astype(np.float32)
    number = ~np.isnan(want)
    for row in out:
        np.testing.assert_array_equal(row, want)
        np.testing.assert_array_equal(row.view(np.uint32)[number], want.view(np.uint32)[number])
        nan = halves[~number].astype(np.uint32)
        quiet = (nan & 0x8000) << 16 | 0x7FC00000 | (nan & 0x3FF) << 13
        np.testing.assert_array_equal(row.view(np.uint32)[~number], quiet)


@kernel
def floats_to_halves(floats: Array, halves: Array, one_by_one: Array, back: Array) -> None:
    for i in range(0, floats.size, 16):
        store(halves, i, float_to_half(load(F32x16, floats, i)))
    for i in range(floats.size):
        back[i] = store_half(one_by_one, i, floats[i])


def test_floats_become_the_nearest_half() -> None:
    """Random patterns, and the midpoints between neighbouring float16 with the floats just below and above them."""
    finite = np.arange(0x7C00, dtype=np.uint16)
    below = finite.view(np.float16).astype(np.float64)
    midpoints = ((below + np.append(below[1:], 65536.0)) / 2).astype(np.float32)
    around = np.concatenate([midpoints, *(np.nextafter(midpoints, np.float32(to)) for to in (0, 1e9))])
    random = np.random.default_rng(10).integers(0, 2**32, 2**20, np.uint32).view(np.float32)
    x = np.concatenate([around, -around, random[~np.isnan(random)], floats(11)])
    x = np.ascontiguousarray(x[: x.size // 16 * 16])
    halves, back = np.zeros((2, x.size), np.uint16), np.zeros_like(x)
    floats_to_halves(x, halves[0], halves[1], back)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    number = ~np.isnan(x)
    for row in halves:
        np.testing.assert_array_equal(row[number], want.view(np.uint16)[number])
        assert np.isnan(row.view(np.float16)[~number]).all()
    np.testing.assert_array_equal(back, want.astype(np.float32))


@kernel
def widened(halves: Array, out: Array) -> None:
    tile = scratch(F32x16, 16)
    for i in range(0, halves.size, 256):
        load_transposed(halves, LANE * 16 + i, tile, 0)
        for k in range(16):
            store(out[0], i + 16 * k, load(F32x16, halves, i + 16 * k))
            store(out[1], i + 16 * k, tile[k])


def test_bfloat16_is_loaded_as_float32() -> None:
    halves, out = np.arange(65536, dtype=np.uint16), np.zeros((2, 65536), np.float32)
    widened(halves, out)
    want = (halves.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(out[0], want)
    np.testing.assert_array_equal(out[1].reshape(-1, 16, 16).swapaxes(1, 2).reshape(-1), want)


@kernel
def reversed_lanes(x: Array, out: Array) -> None:
    vectors = scratch(F32x16, 2)
    for i in range(0, x.size, 16):
        vectors[0], vectors[1] = load(F32x16, x, i), splat(F32x16, 1)
        for k in range(16):
            set_lane(vectors, 1, k, lane(vectors, 0, 15 - k))
        store(out, i, vectors[1])


def test_lanes_of_scratch() -> None:
    x, out = floats(12), np.zeros(N, np.float32)
    reversed_lanes(x, out)
    np.testing.assert_array_equal(out, x.reshape(-1, 16)[:, ::-1].reshape(-1))


def test_half_conversion_needs_no_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """The software conversion, where the hardware's would be chosen."""
    from llamatools.dtypes.simd import half

    monkeypatch.setattr(half, "features", frozenset)
    monkeypatch.setattr(compiled, "_kept", lambda *_: None)
    monkeypatch.setattr(compiled, "_keep", lambda *_: None)
    in_software = kernel(halves_to_floats.dispatcher.py_func)
    halves = np.arange(0x7C00, dtype=np.uint16)
    out = np.zeros((2, halves.size), np.float32)
    in_software(halves, out[0], out[1])
    np.testing.assert_array_equal(out, [halves.view(np.float16).astype(np.float32)] * 2)


# ---- dot products of bytes

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
