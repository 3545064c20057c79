"""What logits say of a text: how likely each of its tokens is, and how far two models are from each other at it.

Every number here is one per token, so that means, quantiles and their errors can be taken of any set of tokens. The
definitions are llama-perplexity's (llama.cpp, tools/perplexity/perplexity.cpp), with one difference: its base model's
log probabilities have gone through a file of 16-bit integers that end at e ** -16, and what is less likely than that
is left out of its sum. Here nothing is rounded and nothing left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from llamatools.dtypes import Floats

from .weights import Ids

Numbers = NDArray[np.float64]

SLAB = 1 << 19  # log probabilities that are held at a time: 4 MB


@dataclass(frozen=True)
class Scores:
    """Numbers of each token (n_tokens,).

    surprise: -log of its probability, in nats. base_surprise: the same by the base model.
    divergence: KL(base || model) of the probabilities of all tokens that could stand there, in nats.
    same_top: whether both models find the same token likeliest.
    """

    surprise: Numbers
    base_surprise: Numbers
    divergence: Numbers
    same_top: NDArray[np.bool_]

    @property
    def change(self) -> Numbers:
        """How much more probable the token is to the model than to the base."""
        return np.exp(-self.surprise) - np.exp(-self.base_surprise)

    @classmethod
    def joined(cls, parts: list[Scores]) -> Scores:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def surprise(logits: Floats, tokens: Ids) -> Numbers:
    """-log of the probability that logits (n_tokens, vocab_size) give to each of `tokens` (n_tokens,), in nats."""
    return np.concatenate([-_at(log_softmax(logits[slab]), tokens[slab]) for slab in _slabs(logits)])


def score(base_logits: Floats, logits: Floats, tokens: Ids) -> Scores:
    """What two models' logits (n_tokens, vocab_size) say of `tokens` (n_tokens,)."""
    parts = []
    for slab in _slabs(logits):
        base, model = log_softmax(base_logits[slab]), log_softmax(logits[slab])
        same_top = base_logits[slab].argmax(axis=1) == logits[slab].argmax(axis=1)
        parts.append(Scores(-_at(model, tokens[slab]), -_at(base, tokens[slab]), _divergence(base, model), same_top))
    return Scores.joined(parts)


def divergence(p_logits: Floats, q_logits: Floats) -> Numbers:
    """KL(p || q) in nats at each position (n_tokens,), of the distributions that logits (n_tokens, vocab_size) give."""
    slabs = _slabs(p_logits)
    return np.concatenate([_divergence(log_softmax(p_logits[slab]), log_softmax(q_logits[slab])) for slab in slabs])


def log_softmax(logits: Floats) -> Numbers:
    """Log probabilities (n_tokens, vocab_size) from logits."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _divergence(log_p: Numbers, log_q: Numbers) -> Numbers:
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=1).clip(min=0))  # below 0 only by rounding


def _at(log_p: Numbers, tokens: Ids) -> Numbers:
    return np.asarray(np.take_along_axis(log_p, tokens[:, None], axis=1)[:, 0])


def _slabs(logits: Floats) -> Iterator[slice]:
    n_rows = max(1, SLAB // logits.shape[1])
    return (slice(start, start + n_rows) for start in range(0, len(logits), n_rows))


@dataclass(frozen=True)
class Estimate:
    """A number measured on a sample of tokens, and its standard error."""

    value: float
    error: float

    def scaled(self, factor: float) -> Estimate:
        return Estimate(factor * self.value, factor * self.error)

    def __format__(self, spec: str) -> str:
        """Both in the same format: 17.34 ± 0.57."""
        return f"{self.value:{spec}} ± {self.error:{spec}}"


def mean(values: NDArray[np.float64] | NDArray[np.bool_]) -> Estimate:
    """The mean, and the standard deviation over sqrt(n - 1). Of truths: their share, with a binomial's error."""
    return Estimate(float(np.mean(values)), float(np.std(values)) / math.sqrt(max(1, len(values) - 1)))


def exponential(x: Estimate) -> Estimate:
    """e ** x; an error grows as the slope there."""
    value = math.exp(min(x.value, 700.0))  # float64 ends at e ** 709
    return Estimate(value, value * x.error)


def root_mean_square(values: Numbers) -> Estimate:
    square = mean(np.square(values))
    root = math.sqrt(square.value)
    return Estimate(root, 0.5 / root * square.error if root else 0.0)


def quantile(values: Numbers, share: float) -> Estimate:
    """What that share of the values lies below, interpolated between neighbours.

    How many of n values lie below a true quantile is binomial: n * share, give or take sqrt(n * share * (1 - share)).
    The error is half the distance between the values of these two ranks. (llama-perplexity states none.)
    """
    n = len(values)
    spread = math.sqrt(share * (1 - share) / n)
    low, middle, high = np.quantile(values, np.clip([share - spread, share, share + spread], 0, 1))
    return Estimate(float(middle), float(high - low) / 2)
