"""Sums that tell how far blocks are from the weights they were made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base import Floats
from ..simd import LANE, F32x16, I32x16, convert, inlined, kernel, load, lookup, select, splat
from . import Bytes

Sums = NDArray[np.float64]
RUN = 4096  # weights whose squares are added in float32 before they join a sum in float64


@kernel
def squares(values: Floats, sums: Sums) -> None:
    """sums[0] becomes the sum of squares, which is no number exactly where a weight is none or is beyond 1.8e19."""
    total = 0.0
    whole = values.size // 16 * 16
    for first in range(0, whole, RUN):
        run = splat(F32x16, 0)
        for k in range(first, min(first + RUN, whole), 16):
            x = load(F32x16, values, k)
            run = run + x * x
        total += _sum(run)
    if whole < values.size:  # the last few, among those of the last sixteen
        x = load(F32x16, values, values.size - 16)
        n_added = 16 - (values.size - whole)
        rest = select(n_added > LANE, 0, x * x)
        total += _sum(rest)
    sums[0] = total


@inlined
def compare(
    decode: Any, nbytes: int, block_size: int, values: Floats, blocks: Bytes, decoded: Floats, sums: Sums
) -> None:
    """sums become: squares of weights; squares of errors; those of the worst block alone; where that block begins.

    decode: of one block (blocks, block, decoded, 0). nbytes, block_size: of a block. decoded: room for one.
    """
    total, errors, worst, where = 0.0, 0.0, -1.0, 0
    n_blocks, per_run = blocks.size // nbytes, RUN // block_size
    for run in range(0, n_blocks, per_run):
        own = splat(F32x16, 0)
        for b in range(run, min(run + per_run, n_blocks)):
            decode(blocks, b * nbytes, decoded, 0)
            off = splat(F32x16, 0)
            for k in range(0, block_size, 16):
                x = load(F32x16, values, block_size * b + k)
                difference = load(F32x16, decoded, k) - x
                own = own + x * x
                off = off + difference * difference
            error = _sum(off)
            errors += error
            if error > worst:
                worst, where = error, block_size * b
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
