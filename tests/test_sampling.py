"""Choosing the next token."""

import numpy as np
import pytest
import torch
from llamatools_runtime.sampling import Sampler
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llamatools.errors import UsageError

LOGITS = np.random.default_rng(0).standard_normal(50).astype(np.float32) * 3


def test_the_default_takes_the_likeliest_and_of_equals_the_first():
    assert Sampler()(LOGITS) == LOGITS.argmax()
    assert Sampler()(np.array([1, 3, 3, 2], np.float32)) == 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 7])
@pytest.mark.parametrize("top_p", [0.2, 0.9, 1.0])
def test_candidates_and_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(LOGITS)[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = torch.softmax(scores.double(), -1)[0].numpy()

    ids, probabilities = Sampler(temperature, top_k, top_p).candidates(LOGITS)

    found = np.zeros(len(LOGITS))
    found[ids] = probabilities
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_draws_follow_the_probabilities():
    sampler = Sampler(temperature=1.0, top_k=3, seed=5)
    ids, probabilities = sampler.candidates(LOGITS)
    draws = [sampler(LOGITS) for _ in range(4000)]
    shares = [draws.count(i) / len(draws) for i in ids]
    np.testing.assert_allclose(shares, probabilities, atol=0.03)


def test_the_same_seed_gives_the_same_draws():
    first, second, other = (Sampler(temperature=2.0, seed=seed) for seed in (1, 1, 2))
    draws = [[sampler(LOGITS) for _ in range(20)] for sampler in (first, second, other)]
    assert draws[0] == draws[1] != draws[2]


def test_a_tiny_temperature_is_greedy():
    sampler = Sampler(temperature=1e-300, seed=0)
    assert {sampler(LOGITS) for _ in range(10)} == {int(LOGITS.argmax())}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "a temperature of -1.0: it must be 0 or more"),
        ({"temperature": float("nan")}, "a temperature of nan: it must be 0 or more"),
        ({"temperature": float("inf")}, "a temperature of inf: it must be 0 or more"),
        ({"top_k": -1}, "a top-k of -1: it must be 1 or more, or 0 for all tokens"),
        ({"top_p": 0.0}, "a top-p of 0.0: it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "a top-p of 1.5: it must be above 0 and at most 1"),
        ({"seed": -3}, "a seed of -3: it must be 0 or more"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Sampler(**options)
