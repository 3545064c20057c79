"""Compiled functions between blocks and float32, one module per family and direction.

Every kernel does all the blocks it is given, from one-dimensional arrays: blocks as bytes, weights as float32. It holds
no lock of Python's, so threads work on different rows at the same time. What it reads may be read-only memory.

This module itself is light: a kernel is loaded, or compiled, when a quantized tensor is first en- or decoded.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base import Blocks, Compare, Decode, Encode, Floats, Weights
from ..compiled import Kernel

FLOOR = np.float32(1e-6)  # importance of columns that a search knows nothing of, so that it codes them at all
Bytes = NDArray[np.uint8]  # blocks as a kernel sees them: (n_blocks * block_nbytes,)


@cache
def kernel_function(name: str) -> Kernel:
    """The kernel of that name, "module.function"."""
    module, function = name.split(".")
    return Kernel(f"{__name__}.{module}", function)


def decoder(kernel: str, block_size: int) -> Decode:
    """The decode function of a dtype. kernel: "module.function" in this package, called with (blocks, values)."""

    def decode(blocks: Blocks) -> Floats:
        n_rows, n_blocks = blocks.shape
        values = np.empty((n_rows, n_blocks * block_size), np.float32)
        kernel_function(kernel)(_bytes(read_only(blocks)), values.reshape(-1))
        return values

    return decode


def encoder(kernel: str, weighted_kernel: str | None, block: np.dtype[Any], block_size: int) -> Encode:
    """The encode function of a dtype of that block layout.

    kernel is called with (values, blocks); weighted_kernel, where the importance of columns is known, with
    (values, importance, blocks). None where the encoding does not depend on importance.
    """

    def encode(weights: Weights, importance: Floats | None = None) -> Blocks:
        n_rows, n_weights = weights.shape
        blocks: Blocks = np.empty((n_rows, n_weights // block_size), block)
        if importance is None or weighted_kernel is None:
            kernel_function(kernel)(_values(weights), _bytes(blocks))
        else:
            relative = read_only(np.asarray(importance, np.float32))
            kernel_function(weighted_kernel)(_values(weights), relative, _bytes(blocks))
        return blocks

    return encode


def searcher(kernel: str, block: np.dtype[Any], block_size: int) -> Encode:
    """The search function of a dtype: kernel is called with (values, importance, blocks), importance from FLOOR to 1.

    Where no importance is known, or all of it is zero, columns are equal.
    """

    def search(weights: Weights, importance: Floats | None = None) -> Blocks:
        n_rows, n_weights = weights.shape
        blocks: Blocks = np.empty((n_rows, n_weights // block_size), block)
        relative = np.ones(n_weights, np.float32)
        if importance is not None and importance.any():
            relative = np.asarray(importance, np.float32) / np.float32(importance.max())
        kernel_function(kernel)(_values(weights), read_only(np.maximum(relative, FLOOR)), _bytes(blocks))
        return blocks

    return search


def comparer(kernel: str) -> Compare:
    """The compare function of a dtype: kernel is called with (values, blocks, sums)."""

    def compare(weights: Weights, blocks: Blocks) -> NDArray[np.float64]:
        sums = np.empty(4)
        kernel_function(kernel)(_values(weights), _bytes(read_only(blocks)), sums)
        return sums

    return compare


def sum_of_squares(weights: Weights) -> float:
    """Of all weights; no number exactly where a weight is none or is beyond 1.8e19."""
    sums = np.empty(1)
    if weights.size < 16:  # fewer than a kernel looks at
        weights = np.concatenate([weights.reshape(-1), np.zeros(16, weights.dtype)])
    kernel_function("rounding.squares")(_values(weights), sums)
    return float(sums[0])


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """`array`, contiguous, and read-only in name: Numba would else compile a kernel twice, as mapped files are."""
    view = np.require(array, requirements=["C", "A"]).view()
    view.flags.writeable = False
    return view


def _values(weights: Weights) -> NDArray[Any]:
    """Weights as a kernel sees them: float32, or bfloat16 as it is."""
    if weights.dtype != np.uint16:
        weights = np.asarray(weights, np.float32)
    return read_only(weights).reshape(-1)


def _bytes(blocks: Blocks) -> Bytes:
    return blocks.reshape(-1).view(np.uint8)
