"""A token whose steps are done again is computed as one whose steps are done one after the other."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from llamatools_runtime.cache import Cache
from llamatools_runtime.kernels.team import team
from llamatools_runtime.load import load
from llamatools_runtime.model import forward
from llamatools_runtime.planned import model_of_checkpoint
from tiny_llamas import TINY, random_weights, write_gguf

import llamatools
from llamatools.errors import FormatError

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
KINDS = gguf.GGMLQuantizationType
WIDE = replace(TINY, dim=256, hidden_dim=512, n_heads=4, n_kv_heads=2, head_dim=64)
IDS = np.random.default_rng(2).integers(0, WIDE.vocab_size, 60)


def step_by_step(model, ids, cache):
    """The logits of each token, of which none is done again: who is shown the layers gets them one by one."""
    return [forward(model, ids[n : n + 1], cache, on_layer=lambda *_: None) for n in range(len(ids))]


@pytest.mark.parametrize("float32", [False, True], ids=["float16 cache", "float32 cache"])
@pytest.mark.parametrize("recipe", [None, "q4_0", "q8_0", "iq4_nl", "q4_k_m"])
def test_done_again_is_the_same(tmp_path, recipe, float32):
    path = write_gguf(tmp_path / "m.gguf", random_weights(WIDE), WIDE)
    if recipe is not None:
        llamatools.quantize(path, tmp_path / "q.gguf", recipe)
    model, _ = load(tmp_path / "q.gguf" if recipe else path)
    cache, other = Cache.of(WIDE, float32=float32), Cache.of(WIDE, float32=float32)
    found = [forward(model, IDS[n : n + 1], cache) for n in range(len(IDS))]
    assert cache.last_steps[1].is_whole
    np.testing.assert_array_equal(found, step_by_step(model, IDS, other))
    np.testing.assert_array_equal(cache.stored, other.stored)


def test_after_going_back_and_after_a_prompt(tmp_path):
    model, _ = load(write_gguf(tmp_path / "m.gguf", random_weights(WIDE), WIDE, matrices=KINDS.Q4_0))
    cache, other = Cache.of(WIDE), Cache.of(WIDE)
    for each in (cache, other):
        forward(model, IDS[:3], each)
    first = [forward(model, IDS[n : n + 1], cache) for n in range(3, 9)]
    cache.n_past = 3
    forward(model, IDS[20:29], cache)
    cache.n_past = 3
    again = [forward(model, IDS[n : n + 1], cache) for n in range(3, 9)]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, step_by_step(model, IDS[3:9], other))


def test_any_number_of_threads(tmp_path):
    model, _ = load(write_gguf(tmp_path / "m.gguf", random_weights(WIDE), WIDE, matrices=KINDS.Q4_0))
    cache, before = Cache.of(WIDE), team().n_threads
    found = []
    for n_threads in (2, 1, 3):
        team(n_threads)
        cache.n_past = 0
        found.append([forward(model, IDS[n : n + 1], cache) for n in range(20)])
    team(before)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("hparams", "kind", "options"),
    [(WIDE, KINDS.Q4_0, {"float32": True}), (replace(WIDE, n_heads=8, n_kv_heads=4, head_dim=12), KINDS.F32, {})],
    ids=["decoded rows", "heads that fill no vectors"],
)
def test_what_is_not_the_teams_work_is_never_done_again(tmp_path, hparams, kind, options):
    model, _ = load(write_gguf(tmp_path / "m.gguf", random_weights(hparams), hparams, matrices=kind), **options)
    cache, other = Cache.of(hparams), Cache.of(hparams)
    found = [forward(model, IDS[n : n + 1], cache) for n in range(10)]
    assert not cache.last_steps[1].is_whole
    np.testing.assert_array_equal(found, step_by_step(model, IDS[:10], other))


def test_weights_that_are_read_anew_each_time():
    """Of a Meta checkpoint, whose matrices are elsewhere in memory for each token."""
    model, _ = model_of_checkpoint(llamatools.open(CHECKPOINT))
    cache, other = Cache.of(model.hparams, 10), Cache.of(model.hparams, 10)
    found = [forward(model, IDS[n : n + 1], cache) for n in range(10)]
    assert not cache.last_steps[1].is_whole
    np.testing.assert_array_equal(found, step_by_step(model, IDS[:10], other))


def test_another_model_with_the_same_cache(tmp_path):
    models = [
        load(write_gguf(tmp_path / f"{seed}.gguf", random_weights(WIDE, seed), WIDE, matrices=KINDS.Q4_0))[0]
        for seed in (1, 2)
    ]
    cache = Cache.of(WIDE)
    for model in (*models, models[0]):
        cache.n_past = 0
        found = [forward(model, IDS[n : n + 1], cache) for n in range(3)]
        np.testing.assert_array_equal(found, step_by_step(model, IDS[:3], Cache.of(WIDE)))


def test_the_layer_that_makes_infinity_is_named(tmp_path):
    """Of a token that is done again, too: one whose embedding is so large that the second layer cannot bear it."""
    weights = random_weights(WIDE)
    weights["layers.1.attention_norm.weight"][0] = 1e38
    weights["tok_embeddings.weight"][:, 0] = 0
    weights["layers.0.attention.wo.weight"][0] = 0
    weights["layers.0.feed_forward.w2.weight"][0] = 0
    weights["tok_embeddings.weight"][7, 0] = 1e3
    model, _ = load(write_gguf(tmp_path / "m.gguf", weights, WIDE))
    cache = Cache.of(WIDE)
    for token in (1, 2, 3):
        forward(model, np.array([token]), cache)
    with pytest.raises(FormatError, match="layer 1: NaN or infinity first appears here, at token 0 of 1"):
        forward(model, np.array([7]), cache)
