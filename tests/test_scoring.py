"""The numbers of a token are torch's; means and errors are those that llama-perplexity computes from its sums."""

import math

import numpy as np
import pytest
import torch
from llamatools_runtime import scoring
from llamatools_runtime.scoring import divergence, exponential, mean, quantile, root_mean_square, score, surprise

P, Q = (torch.randn(50, 40, generator=torch.Generator().manual_seed(n)) * 3 for n in (1, 2))
TOKENS = torch.randint(0, 40, (50,), generator=torch.Generator().manual_seed(3))
LOG_P, LOG_Q = P.double().log_softmax(-1), Q.double().log_softmax(-1)
KL = torch.nn.functional.kl_div(LOG_Q, LOG_P, reduction="none", log_target=True).sum(-1)


@pytest.fixture(params=[1, 40 * 7, 1 << 19], ids=["a row at a time", "7 rows", "all at once"], autouse=True)
def slab(request, monkeypatch):
    monkeypatch.setattr(scoring, "SLAB", request.param)


def test_divergence_is_torchs():
    np.testing.assert_allclose(divergence(P.numpy(), Q.numpy()), KL, rtol=1e-9)
    assert (divergence(P.numpy(), P.numpy()) == 0).all()


def test_surprise_is_torchs_cross_entropy():
    expected = torch.nn.functional.cross_entropy(P.double(), TOKENS, reduction="none")
    np.testing.assert_allclose(surprise(P.numpy(), TOKENS.numpy()), expected, rtol=1e-9)


def test_two_models_are_scored_at_once():
    scores = score(P.numpy(), Q.numpy(), TOKENS.numpy())
    np.testing.assert_allclose(scores.divergence, KL, rtol=1e-9)
    np.testing.assert_allclose(scores.base_surprise, surprise(P.numpy(), TOKENS.numpy()))
    np.testing.assert_allclose(scores.surprise, surprise(Q.numpy(), TOKENS.numpy()))
    np.testing.assert_array_equal(scores.same_top, P.argmax(-1) == Q.argmax(-1))
    at = torch.arange(50), TOKENS
    np.testing.assert_allclose(scores.change, LOG_Q.exp()[at] - LOG_P.exp()[at], rtol=1e-9)


def test_logits_far_apart_do_not_overflow():
    logits = np.array([[0, 2000, -2000]], np.float32)
    np.testing.assert_array_equal(surprise(logits, np.array([0])), [2000])


def of_sums(total, total_of_squares, n):
    """`mean_and_uncertainty` in llama.cpp's perplexity.cpp."""
    average = total / n
    return average, math.sqrt((total_of_squares / n - average**2) / (n - 1))


def test_a_mean_has_llama_perplexitys_error():
    values = KL.numpy()
    found = mean(values)
    assert (found.value, found.error) == pytest.approx(of_sums(values.sum(), (values**2).sum(), 50))


def test_a_share_has_a_binomials_error():
    found = mean(np.arange(40) < 10)
    assert (found.value, found.error) == pytest.approx((0.25, math.sqrt(0.25 * 0.75 / 39)))


def test_a_perplexitys_error_is_propagated():
    values = KL.numpy()
    average, error = of_sums(values.sum(), (values**2).sum(), 50)
    found = exponential(mean(values))
    assert (found.value, found.error) == pytest.approx((math.exp(average), math.exp(average) * error))


def test_a_root_mean_square_has_llama_perplexitys_error():
    values = KL.numpy()
    square, error = of_sums((values**2).sum(), (values**4).sum(), 50)
    found = root_mean_square(values)
    assert (found.value, found.error) == pytest.approx((math.sqrt(square), 0.5 / math.sqrt(square) * error))
    assert root_mean_square(np.zeros(5)) == mean(np.zeros(5))


def test_a_quantile_lies_between_neighbours():
    """`percentile` in llama.cpp's perplexity.cpp."""
    values = np.sort(KL.numpy())
    place = 0.99 * 49
    expected = (1 - place % 1) * values[int(place)] + place % 1 * values[int(place) + 1]
    assert quantile(KL.numpy(), 0.99).value == pytest.approx(expected)


def test_a_quantiles_error_is_how_much_it_varies_from_sample_to_sample():
    samples = np.random.default_rng(4).exponential(size=(400, 2000))
    found = [quantile(sample, 0.99) for sample in samples]
    varies = np.std([estimate.value for estimate in found])
    assert np.mean([estimate.error for estimate in found]) == pytest.approx(varies, rel=0.15)


def test_an_estimate_is_written_with_its_error():
    assert f"{mean(np.array([1.0, 2.0, 3.0])):.2f}" == "2.00 ± 0.58"
