"""How far a file may be from its original before it is called another model: bounds for each dtype.

Where the file holds the very weights of the original, both compute the same function and differ only by the order of
float32 sums: measured 3e-6 of the logits' scale on stories260K (5 layers), so EXACT leaves room for 80 layers, and is
still below what the smallest planted error (norm_eps 1e-6 for 1e-5) makes of that model, 2e-4.

Where weights were rounded, each tensor is held to the rounding error of its dtype, which catches a wrong order of rows
however little a model cares, and the model to a mean divergence, which bounds what the rounding does to its words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from llamatools.dtypes import DType

EXACT = 1e-4


class Bounds(NamedTuple):
    """weights: of a tensor's error, relative to its root mean square. divergence: of the mean over a text, in nats."""

    weights: float
    divergence: float


# Comments: errors measured on stories260K and on random weights of three kinds (gaussian to heavy-tailed), the worst;
# mean divergences on stories260K (a), random weights (b), and as reported for files of llama.cpp's quantizer of
# SmolLM2-135M (c) and Llama-3-8B (d).
ROUNDED = {
    "F32": Bounds(1e-6, 1e-5),  # of an F64 original
    "F16": Bounds(0.002, 1e-5),  # 0.0002; a 9e-7
    "BF16": Bounds(0.004, 1e-3),  # 0.0020, never above 2 ** -8; a 8e-5
    "Q8_0": Bounds(0.03, 0.01),  # 0.0095; a 2e-4, d 0.0014
    "Q6_K": Bounds(0.08, 0.02),  # 0.028; b 0.0012
    "Q5_K": Bounds(0.2, 0.1),  # 0.049; b 0.005
    "Q5_1": Bounds(0.2, 0.1),  # 0.051; a 0.013
    "Q5_0": Bounds(0.2, 0.1),  # 0.071; a 0.016
    "Q4_K": Bounds(0.3, 0.5),  # 0.095; b 0.020, d 0.031
    "Q4_1": Bounds(0.3, 0.5),  # 0.105; a 0.045
    "IQ4_NL": Bounds(0.3, 0.5),  # 0.105; a 0.054, c 0.21
    "IQ4_XS": Bounds(0.3, 0.5),  # 0.107; b 0.022
    "Q4_0": Bounds(0.3, 0.5),  # 0.132; a 0.063, c 0.31
    "MXFP4": Bounds(0.4, 1.0),  # 0.149; a 0.15
    "Q3_K": Bounds(0.5, 1.0),  # 0.184; b 0.083
    "Q2_K": Bounds(0.8, 2.0),  # 0.345; b 0.27
}

# The dtypes whose every value a dtype holds, besides its own.
HOLDS = {"F64": {"F32", "F16", "BF16"}, "F32": {"F16", "BF16"}}


def rounds(stored: DType, original: DType) -> bool:
    """Whether weights of dtype `original` may change when they are stored as `stored`."""
    return stored is not original and original.name not in HOLDS.get(stored.name, ())


def weights_bound(stored: DType, original: DType) -> float:
    """The largest relative error of a tensor that was stored so: 0 where nothing may change."""
    return ROUNDED[stored.name].weights if rounds(stored, original) else 0.0


@dataclass(frozen=True)
class Tolerance:
    """What a whole model is held to; None for a bound that does not apply.

    dtype: the one that weights were rounded to, None where the file holds the very weights of the original.
    logits: of the largest difference, relative to their scale. divergence: of the mean, in nats.
    states: relative difference from which hidden states are said to part; it only tells where to look. Divergence
        grows as the square of the error, so it is the square root of the former.
    """

    dtype: str | None
    logits: float | None
    divergence: float | None
    states: float

    def __str__(self) -> str:
        if self.dtype is None:
            return f"{self.logits:.0e} of the logits' scale (the weights are the original's)"
        return f"{self.divergence:.0e} nats on average (weights are rounded to {self.dtype})"


def tolerance_for(pairs: Iterable[tuple[DType, DType]]) -> Tolerance:
    """The bounds for pairs (dtype of a tensor in the file, dtype of it in the original): those of the coarsest."""
    rounded = [stored.name for stored, original in pairs if rounds(stored, original)]
    if not rounded:
        return Tolerance(None, EXACT, None, EXACT)
    coarsest = max(rounded, key=lambda name: ROUNDED[name])
    divergence = ROUNDED[coarsest].divergence
    return Tolerance(coarsest, None, divergence, math.sqrt(divergence))
