"""Products of quantized matrices as they lie in the file, against sums in float64 of decoded weights times activations.

The activations of the oracle are quantized here, in numpy, as ggml's quantize_row_q8_0 and quantize_row_q8_K do.
"""

from __future__ import annotations

import json
from typing import Any

import llamacpp
import numpy as np
import pytest
from llamatools_runtime.kernels.products import KERNELS
from llamatools_runtime.kernels.team import Team, team
from llamatools_runtime.weights import Matrix, matmul, matmuls
from product_digests import digests
from test_processors import child, lesser_tiers

from llamatools import dtypes
from llamatools.dtypes import DType

QUANTIZED = [dtypes.named(name) for name in KERNELS if dtypes.named(name).is_quantized]
f32 = np.float32


def matrix_of(dtype: DType, n_out: int, n_in: int, seed: int = 0, scale: float = 0.02) -> Matrix:
    """Random weights, encoded."""
    weights = np.random.default_rng(seed).standard_normal((n_out, n_in), np.float32) * f32(scale)
    encoded = llamacpp.quantize(dtype.id, weights).view(dtype.block).reshape(n_out, -1)
    return Matrix("w", dtype, (n_out, n_in), encoded)


def tokens(n_tokens: int, n_in: int, scale: float = 1.0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(n_tokens).standard_normal((n_tokens, n_in), np.float32) * f32(scale)


def in_eight_bits(x: np.ndarray[Any, Any], columns: int) -> np.ndarray[Any, Any]:
    """x as ggml quantizes activations: Q8_0 where 32 columns share a scale, Q8_K where 256 do."""
    blocks = x.reshape(len(x), -1, columns)
    largest = np.abs(blocks).max(-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest > 0, f32(127) / largest, f32(0))
        if columns == 32:
            d = largest / f32(127)
            halved = d.astype(np.float16).astype(np.float32)
            d = np.where((d >= 2.0**-14) & (d <= 65504), halved, d)
        else:
            d = np.where(largest > 0, 1 / inverse, f32(0))
    return (np.rint(blocks * inverse).astype(np.float64) * d).reshape(x.shape)


def check(matrix: Matrix, x: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> None:
    """That `found` is the exact product but for the rounding of float32 sums."""
    assert matrix.dtype.decode is not None
    weights = matrix.dtype.decode(matrix.blocks).astype(np.float64)
    rounded = in_eight_bits(x, KERNELS[matrix.dtype.name][1])
    assert found.dtype == np.float32
    assert found.shape == (len(x), matrix.shape[0])
    # Minima and offsets count apart from codes, so that what is added up is a few times larger than the products.
    largest = np.abs(weights).max(1) + 1e-30
    bound = 2e-6 * np.abs(rounded).sum(1, keepdims=True) * largest / np.sqrt(matrix.shape[1] / 32)
    assert (np.abs(found - rounded @ weights.T) <= bound).all()


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4, 5, 17, 64, 70])
def test_products(dtype: DType, n_tokens: int) -> None:
    for n_out, n_blocks in ((1, 1), (50, 3), (16, 8)):  # tiles are of 16 rows
        matrix = matrix_of(dtype, n_out, n_blocks * dtype.block_size)
        x = tokens(n_tokens, matrix.shape[1])
        check(matrix, x, matmul(matrix, x))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("n_in", [1, 16, 31, 100, 576])
def test_plain_rows(name: str, n_in: int) -> None:
    dtype = dtypes.named(name)
    assert dtype.encode is not None
    assert dtype.decode is not None
    weights = np.random.default_rng(n_in).standard_normal((45, n_in), np.float32)
    matrix = Matrix("w", dtype, weights.shape, dtype.encode(weights, None))
    for x in (tokens(1, n_in), tokens(3, n_in)):
        exact = x.astype(np.float64) @ dtype.decode(matrix.blocks).astype(np.float64).T
        np.testing.assert_allclose(matmul(matrix, x), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 9])
def test_row_lengths(dtype: DType, n_tokens: int) -> None:
    lengths = [256, 5632] if dtype.block_size == 256 else [32, 64, 96, 128, 160, 288, 576, 5632]
    for n_in in lengths:
        matrix = matrix_of(dtype, 40, n_in)
        x = tokens(n_tokens, n_in)
        check(matrix, x, matmul(matrix, x))


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-3, 1e4, 1e12])
def test_extreme_activations(dtype: DType, n_tokens: int, scale: float) -> None:
    matrix = matrix_of(dtype, 20, 512)
    x = tokens(n_tokens, 512, scale)
    x[:, 300:] *= f32(1e-3)
    check(matrix, x, matmul(matrix, x))


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 6])
def test_random_blocks(dtype: DType, n_tokens: int) -> None:
    """Every code and every scale within a block, the largest among them."""
    matrix = matrix_of(dtype, 64, 1024)
    draws = np.random.default_rng(3)
    blocks = matrix.blocks.copy()
    for name in blocks.dtype.names or ():
        if blocks.dtype[name].base.kind != "f":
            shape = (*blocks.shape, blocks.dtype[name].itemsize)
            blocks[name] = (
                draws.integers(0, 256, shape, np.uint8).view(blocks.dtype[name].base).reshape(blocks[name].shape)
            )
    matrix = Matrix("w", dtype, matrix.shape, blocks)
    x = tokens(n_tokens, 1024)
    x[0, ::7] = 3  # many of the largest code
    check(matrix, x, matmul(matrix, x))


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_stays_none(dtype: DType, n_tokens: int, wrong: float) -> None:
    x = tokens(n_tokens, 512)
    x[-1, 100] = wrong
    found = matmul(matrix_of(dtype, 20, 512), x)
    assert not np.isfinite(found[-1]).any()
    assert np.isfinite(found[:-1]).all()


@pytest.mark.parametrize("n_tokens", [1, 6])
def test_several_matrices_at_once(n_tokens: int) -> None:
    """Of different sizes and kinds: x is quantized in both ways, and one matrix has no kernel."""
    kinds = ["Q4_K", "Q4_0", "Q3_K", "Q6_K", "Q4_0"]
    matrices = [
        matrix_of(dtypes.named(kind), n_out, 768, n_out) for kind, n_out in zip(kinds, (40, 7, 9, 300, 2), strict=True)
    ]
    x = tokens(n_tokens, 768)
    together = matmuls(matrices, x)
    for matrix, found in zip(matrices, together, strict=True):
        np.testing.assert_array_equal(found, matmul(matrix, x))


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_float32_leaves_activations_as_they_are(dtype: DType) -> None:
    matrix, x = matrix_of(dtype, 30, 512), tokens(3, 512)
    assert dtype.decode is not None
    exact = x.astype(np.float64) @ dtype.decode(matrix.blocks).astype(np.float64).T
    np.testing.assert_allclose(matmul(matrix, x, float32=True), exact, rtol=1e-4, atol=1e-5)
    assert np.abs(matmul(matrix, x) - exact).max() > 1e-4  # while eight bits show


def test_the_number_of_threads_makes_no_difference() -> None:
    matrices = [matrix_of(dtype, 700, 2048) for dtype in QUANTIZED]
    n_threads = team().n_threads
    try:
        results = []
        for n in (1, 2, 3):
            assert team(n).n_threads == n
            for n_tokens in (1, 30):
                results.append(matmuls(matrices, tokens(n_tokens, 2048)))
        for k, found in enumerate(results):
            for a, b in zip(found, results[k % 2], strict=True):
                np.testing.assert_array_equal(a, b)
    finally:
        team(n_threads)


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_a_token_is_multiplied_the_same_whatever_comes_with_it(dtype: DType) -> None:
    matrix, x = matrix_of(dtype, 20, 768), tokens(11, 768)
    products = matmul(matrix, x)
    for first, last in ((0, 4), (3, 8), (5, 11), (9, 11)):  # fours of tokens, and what they leave
        np.testing.assert_array_equal(matmul(matrix, x[first:last]), products[first:last])


def test_a_team_ends_its_threads() -> None:
    crew = Team(3)
    crew.close()
    assert not any(thread.is_alive() for thread in crew._threads)


@pytest.mark.parametrize("tier", lesser_tiers())
def test_every_tier_gives_the_same_bytes(tier: str) -> None:
    """Of each way to take blocks apart and to add up, one dtype."""
    names = ["Q4_0", "Q5_1", "Q6_K", "IQ4_XS"]
    result = child("product_digests.py", *names, LLAMATOOLS_SIMD=tier)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == dict(digests(names))
