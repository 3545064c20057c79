"""Sums that tell how far decoded blocks are from the weights they were made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base import Floats
from ..simd import LANE, F32x16, I32x16, convert, inlined, kernel, load, lookup, splat

RUN = 4096  # weights whose squares are added in float32 before they join a sum in float64


@kernel
def squares(values: Floats, sums: NDArray[np.float64]) -> None:
    """sums[0] becomes the sum of squares, which is no number exactly where a weight is none or is beyond 1.8e19."""
    total = 0.0
    whole = values.size // 16 * 16
    for first in range(0, whole, RUN):
        run = splat(F32x16, 0)
        for k in range(first, min(first + RUN, whole), 16):
            x = load(F32x16, values, k)
            run = run + x * x
        total += _sum(run)
    for k in range(whole, values.size):
        total += values[k] * values[k]
    sums[0] = total


@kernel
def compare(values: Floats, decoded: Floats, block_size: int, sums: NDArray[np.float64]) -> None:
    """sums become: squares of weights; squares of errors; those of the worst block alone; where that block begins.

    block_size: a power of two from 16 to RUN.
    """
    total, errors, worst, where = 0.0, 0.0, -1.0, 0
    for run in range(0, values.size, RUN):
        own = splat(F32x16, 0)
        for first in range(run, min(run + RUN, values.size), block_size):
            off = splat(F32x16, 0)
            for k in range(first, first + block_size, 16):
                x = load(F32x16, values, k)
                difference = load(F32x16, decoded, k) - x
                own = own + x * x
                off = off + difference * difference
            error = _sum(off)
            errors += error
            if error > worst:
                worst, where = error, first
        total += _sum(own)
    sums[0], sums[1], sums[2], sums[3] = total, errors, worst, where


@inlined
def _sum(x: Any) -> Any:
    """All lanes, added in pairs."""
    lane = convert(I32x16, LANE)
    x = x + lookup(x, lane ^ 8)
    x = x + lookup(x, lane ^ 4)
    x = x + lookup(x, lane ^ 2)
    x = x + lookup(x, lane ^ 1)
    return x[0]
