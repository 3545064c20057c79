"""Sums that tell how far blocks are from the weights they were made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base import Floats
from ..simd import (
    LANE,
    F32x16,
    inlined,
    kernel,
    lanes_of,
    load,
    reduce_add,
    reduce_max,
    reduce_min,
    scratch,
    select,
    splat,
    totals,
)
from . import Bytes

f32 = np.float32
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
        total += reduce_add(run)
    if whole < values.size:  # the last few, among those of the last sixteen
        x = load(F32x16, values, values.size - 16)
        n_added = 16 - (values.size - whole)
        rest = select(n_added > LANE, 0, x * x)
        total += reduce_add(rest)
    sums[0] = total


@inlined
def compare(decode: Any, nbytes: int, block_size: int, values: Floats, blocks: Bytes, sums: Sums) -> None:
    """sums become: squares of weights; squares of errors; those of the worst block alone; where that block begins.

    decode: of one block (blocks, block, decoded, 0). nbytes, block_size: of a block. Blocks are done by sixteens.
    """
    decoded, off = scratch(F32x16, 16), scratch(F32x16, 16)
    total, errors, worst, where = 0.0, 0.0, f32(-1), 0
    n_blocks = blocks.size // nbytes
    for group in range(0, n_blocks, 16):
        count = min(16, n_blocks - group)
        own = splat(F32x16, 0)
        for b in range(count):
            decode(blocks, (group + b) * nbytes, lanes_of(decoded), 0)
            own_block, off_block = splat(F32x16, 0), splat(F32x16, 0)
            for k in range(block_size // 16):
                x = load(F32x16, values, block_size * (group + b) + 16 * k)
                difference = decoded[k] - x
                own_block = own_block + x * x
                off_block = off_block + difference * difference
            own = own + own_block
            off[b] = off_block
        for b in range(count, 16):
            off[b] = splat(F32x16, 0)
        off_each = totals(off)
        total += reduce_add(own)
        errors += reduce_add(off_each)
        most = reduce_max(off_each)
        if most > worst:
            worst = most
            where = block_size * (group + reduce_min(select(off_each == most, LANE, 16)))
    sums[0], sums[1], sums[2], sums[3] = total, errors, worst, where
