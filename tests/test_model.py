"""The page that computes: each idea against torch, the whole against the oracle and llama.cpp."""

from dataclasses import replace

import gguf
import llamacpp
import numpy as np
import pytest
from llamatools_runtime import cache
from llamatools_runtime.cache import Cache
from llamatools_runtime.generation import generate
from llamatools_runtime.load import load
from llamatools_runtime.model import forward, frequencies
from llamatools_runtime.oracle import Oracle
from llamatools_runtime.sampling import Sampler
from tiny_llamas import STORIES, TINY, checkpoint_of, needs_stories, random_weights, rope_divisors, stories, write_gguf

from llamatools.checkpoint import RopeScaling
from llamatools.errors import FormatError, SpaceError, UsageError

KINDS = gguf.GGMLQuantizationType
WEIGHTS = random_weights(TINY)
IDS = np.random.default_rng(1).integers(0, TINY.vocab_size, TINY.max_seq_len)


def float_cache(hparams):
    return Cache.of(hparams, float32=True)


def assert_equal_to_scale(found, expected, tolerance=5e-5):
    assert np.abs(found - expected).max() <= tolerance * np.sqrt(np.mean(np.square(expected)))


def oracle_logits(weights, hparams, ids):
    oracle = Oracle(checkpoint_of(weights, hparams))
    *_, last = oracle.hidden_states([int(i) for i in ids])
    return oracle.logits(last)


def test_frequencies_are_the_published_ones():
    """Llama 3.1's, whose divisors for heads of 128 are listed in the format facts."""
    scaling = RopeScaling(8.0)
    h = replace(TINY, head_dim=128, rope_theta=500000.0)
    divisors = rope_divisors(h, scaling)
    np.testing.assert_allclose(
        divisors[28:35], [1, 1.207484, 1.553415, 2.026313, 2.69453, 3.684253, 5.257327], rtol=1e-5
    )
    assert frequencies(500000.0, divisors)[0] == 1
    np.testing.assert_allclose(frequencies(500000.0, divisors)[63], 500000.0 ** (-126 / 128) / 8, rtol=1e-5)


VARIANTS = {
    "grouped queries": TINY,
    "a head of keys for each": replace(TINY, n_kv_heads=8),
    "one head of keys": replace(TINY, n_kv_heads=1),
    "heads wider than dim / n_heads": replace(TINY, head_dim=12),
    "a theta of 500000": replace(TINY, rope_theta=500000.0),
    "scaled rotary embedding": replace(TINY, rope_scaling=RopeScaling(8.0, 1.0, 4.0, old_context=64)),
}


@pytest.mark.parametrize("hparams", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_the_oracles(tmp_path, hparams):
    weights = random_weights(hparams, seed=3)
    scaling = hparams.rope_scaling
    factors = {} if scaling is None else {"rope_freqs.weight": rope_divisors(hparams, scaling)}
    model, _ = load(write_gguf(tmp_path / "m.gguf", weights, hparams, more_tensors=factors))
    assert_equal_to_scale(forward(model, IDS, float_cache(hparams)), oracle_logits(weights, hparams, IDS))


def test_a_tied_output_is_the_oracles(tmp_path):
    tied = {name: array for name, array in WEIGHTS.items() if name != "output.weight"}
    model, _ = load(write_gguf(tmp_path / "m.gguf", tied, TINY))
    assert_equal_to_scale(forward(model, IDS, float_cache(TINY)), oracle_logits(tied, TINY, IDS))


@needs_stories
def test_stories260k_is_the_oracles(tmp_path):
    weights, hparams = stories()
    model, _ = load(write_gguf(tmp_path / "m.gguf", weights, hparams))
    ids = np.random.default_rng(4).integers(3, 512, 512)
    assert_equal_to_scale(forward(model, ids, float_cache(hparams)), oracle_logits(weights, hparams, ids))


@needs_stories
@pytest.mark.parametrize("kind", [KINDS.F32, KINDS.F16, KINDS.BF16], ids=lambda kind: kind.name)
def test_stories260k_is_llama_cpps(tmp_path, kind):
    weights, hparams = stories()
    path = write_gguf(tmp_path / "m.gguf", weights, hparams, tokenizer=STORIES / "tokenizer.model", matrices=kind)
    ids = np.random.default_rng(5).integers(3, 512, 200)
    model, _ = load(path, float32=True)
    with llamacpp.Model(path, n_threads=1) as theirs:
        expected = theirs.logits(ids.tolist())
        greedy = theirs.greedy([1], 200)
    # With F16 and BF16 weights, llama.cpp rounds what they are multiplied with to the same dtype.
    tolerance = {"F32": 5e-5, "F16": 5e-3, "BF16": 5e-2}[kind.name]
    assert_equal_to_scale(forward(model, ids, float_cache(hparams)), expected, tolerance)
    assert list(generate(model, [1], Sampler(), max_tokens=200)) == greedy


@pytest.mark.parametrize("hparams", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_llama_cpps(tmp_path, hparams):
    scaling = hparams.rope_scaling
    factors = {} if scaling is None else {"rope_freqs.weight": rope_divisors(hparams, scaling)}
    extra = {"tokenizer.ggml.model": "none"}
    if hparams.head_dim * hparams.n_heads != hparams.dim:
        extra |= {f"llama.attention.{name}_length": hparams.head_dim for name in ("key", "value")}
    path = write_gguf(tmp_path / "m.gguf", random_weights(hparams), hparams, more_tensors=factors, extra=extra)
    with llamacpp.Model(path, n_threads=1) as theirs:
        expected = theirs.logits(IDS.tolist())
    assert_equal_to_scale(forward(load(path)[0], IDS, float_cache(hparams)), expected)


def test_linear_scaling_is_llama_cpps(tmp_path):
    extra = {"tokenizer.ggml.model": "none", "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", WEIGHTS, TINY, extra=extra)
    with llamacpp.Model(path, n_threads=1) as theirs:
        expected = theirs.logits(IDS.tolist())
    assert_equal_to_scale(forward(load(path)[0], IDS, float_cache(TINY)), expected)


def test_the_cache_gives_what_all_tokens_at_once_give(tmp_path):
    model, _ = load(write_gguf(tmp_path / "m.gguf", WEIGHTS, TINY))
    at_once = forward(model, IDS, float_cache(TINY))
    filled = float_cache(TINY)
    parts = [forward(model, part, filled) for part in np.split(IDS, [1, 2, 40, 41])]
    assert_equal_to_scale(np.concatenate(parts), at_once)
    last = forward(model, IDS, float_cache(TINY), last_only=True)
    assert last.shape == (1, TINY.vocab_size)
    assert_equal_to_scale(last, at_once[-1:])


def test_hidden_states_are_shown_after_each_layer(tmp_path):
    model, _ = load(write_gguf(tmp_path / "m.gguf", WEIGHTS, TINY))
    seen = []
    forward(model, IDS, float_cache(TINY), on_layer=lambda n, x: seen.append((n, x.copy())))
    assert [n for n, _ in seen] == [0, 1, 2]
    for (_, found), expected in zip(
        seen, Oracle(checkpoint_of(WEIGHTS, TINY)).hidden_states(IDS.tolist()), strict=True
    ):
        assert_equal_to_scale(found, expected)


def test_more_tokens_than_the_cache_holds_are_refused(tmp_path):
    model, _ = load(write_gguf(tmp_path / "m.gguf", WEIGHTS, TINY))
    cache = Cache.of(TINY, 10)
    forward(model, IDS[:8], cache)
    with pytest.raises(UsageError, match="11 tokens are more than the 10 that the context holds"):
        forward(model, IDS[:3], cache)
    assert Cache.of(TINY, 1000).capacity == TINY.max_seq_len


@pytest.mark.parametrize(("available", "rest"), [(1000, "of which 1000 are available"), (None, "more than there are")])
def test_a_cache_larger_than_memory_is_refused(available, rest, monkeypatch):
    monkeypatch.setattr(cache, "available_memory", lambda: available)
    message = rf"keys and values of 4294967295 tokens take \d{{19}} bytes of memory, {rest}\. Ask for fewer tokens"
    with pytest.raises(SpaceError, match=message):
        Cache.of(replace(TINY, max_seq_len=2**32 - 1, n_layers=10**6, head_dim=128))


@pytest.mark.parametrize("wrong", [-1, TINY.vocab_size])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, wrong):
    model, _ = load(write_gguf(tmp_path / "m.gguf", WEIGHTS, TINY))
    with pytest.raises(FormatError, match=f"'token_embd.weight': token id {wrong} is outside the vocabulary of 300"):
        forward(model, np.array([5, wrong]), float_cache(TINY))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("tok_embeddings.weight", "the embedding"),
        ("layers.0.attention.wk.weight", "layer 0"),
        ("layers.2.feed_forward.w2.weight", "layer 2"),
        ("norm.weight", "the logits"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("error")
def test_numbers_that_are_not_finite_are_found_where_they_first_appear(tmp_path, name, where, value):
    damaged = {key: array.copy() for key, array in WEIGHTS.items()}
    damaged[name].reshape(-1)[: TINY.dim * TINY.vocab_size] = value
    model, _ = load(write_gguf(tmp_path / "m.gguf", damaged, TINY))
    with pytest.raises(FormatError, match=f"{where}: NaN or infinity first appears here, at token 0 of 128"):
        forward(model, IDS, float_cache(TINY))
