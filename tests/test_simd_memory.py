"""The vector layer: memory, scratch, tiles and float16 against numpy, as test_simd.py."""

from __future__ import annotations

import numpy as np
import pytest
from test_simd import Array, N, floats

from llamatools.dtypes import compiled
from llamatools.dtypes.simd import (
    LANE,
    F32x16,
    U16x16,
    float_to_half,
    half_to_float,
    kernel,
    lane,
    load,
    load_half,
    load_transposed,
    maxima,
    minima,
    minimum,
    scratch,
    set_lane,
    splat,
    store,
    store_half,
    totals,
)


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
