"""Choosing the next token from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llamatools.dtypes import Floats
from llamatools.errors import UsageError


@dataclass
class Sampler:
    """How the next token is chosen.

    temperature: what logits are divided by; 0 takes the likeliest token, always. top_k: only this many of the
    likeliest tokens are in the draw; 0 for all. top_p: only the likeliest tokens that together reach this probability
    are, and always the first. seed: the same seed gives the same draws; None for new ones each time.
    Temperature comes first, then top_k, then top_p, as in Meta's generation.py (which has no top_k).
    Raises UsageError for values outside these ranges.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"a temperature of {self.temperature}: it must be 0 or more")
        if self.top_k < 0:
            raise UsageError(f"a top-k of {self.top_k}: it must be 1 or more, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"a top-p of {self.top_p}: it must be above 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"a seed of {self.seed}: it must be 0 or more")

    @cached_property
    def _draws(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)  # what it imports is for those who draw

    def __call__(self, logits: Floats) -> int:
        """The id drawn from logits (vocab_size,). Of equal logits the lower id comes first."""
        if self.temperature == 0:
            return int(np.argmax(logits))
        ids, probabilities = self.candidates(logits)
        drawn = np.searchsorted(np.cumsum(probabilities), self._draws.random(), side="right")
        return int(ids[min(int(drawn), len(ids) - 1)])  # the sum may round to a little less than one

    def candidates(self, logits: Floats) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The ids in the draw, likeliest first, and their probabilities (n,), which add up to one."""
        ids = np.argsort(-logits, kind="stable")[: self.top_k or None]  # (n,)
        below = logits[ids].astype(np.float64) - logits[ids[0]]  # (n,), the first is 0
        with np.errstate(over="ignore"):  # a tiny temperature leaves the first alone in the draw
            probabilities = np.exp(below / self.temperature)  # (n,)
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities) - probabilities  # (n,): what the likelier ones have together
        n = int(np.count_nonzero(before < self.top_p))
        return ids[:n], probabilities[:n] / probabilities[:n].sum()
