"""The steps between the products, against torch."""

import numpy as np
import pytest
import torch
from llamatools_runtime import fused
from llamatools_runtime.cache import Cache
from llamatools_runtime.kernels.team import team
from tiny_llamas import TINY

from llamatools.checkpoint import Hyperparameters

functional = torch.nn.functional


def numbers(*shape, spread=1.0, seed=0):
    return (spread * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 64), (5, 172), (20, 3)])
def test_rms_norm_is_torchs(shape):
    x, weight = numbers(*shape, spread=1e-3), np.linspace(0.5, 2, shape[1], dtype=np.float32)  # eps matters to small x
    expected = functional.rms_norm(torch.from_numpy(x), shape[1:], torch.from_numpy(weight), eps=1e-5)
    np.testing.assert_allclose(fused.rms_norm(x, weight, 1e-5), expected, rtol=1e-5)
    wide = np.repeat(x, 2, axis=1)[:, : shape[1]]  # tokens that lie apart
    np.testing.assert_allclose(fused.rms_norm(wide, weight, 1e-5), fused.rms_norm(wide.copy(), weight, 1e-5))


@pytest.mark.parametrize("shape", [(1, 64), (5, 172), (20, 3)])
def test_the_gate_is_torchs(shape):
    gate, up = numbers(*shape, spread=20), numbers(*shape, seed=1)
    expected = functional.silu(torch.from_numpy(gate)) * torch.from_numpy(up)
    np.testing.assert_allclose(fused.silu_times(gate, up), expected, rtol=1e-6, atol=1e-12)


def test_the_gate_of_every_size_of_number():
    gate = np.concatenate([-np.logspace(-40, 38, 500), np.logspace(-40, 38, 500)]).astype(np.float32)[None]
    found = fused.silu_times(gate, np.ones_like(gate))
    np.testing.assert_allclose(found, functional.silu(torch.from_numpy(gate)), rtol=1e-6, atol=1e-30)
    assert np.isnan(fused.silu_times(np.full((1, 20), np.nan, np.float32), np.ones((1, 20), np.float32))).all()


SHAPES = {  # n_heads, n_kv_heads, head_dim
    "grouped": (8, 2, 64),
    "no groups": (3, 3, 32),
    "one head of keys": (5, 1, 128),
    "narrow heads": (4, 4, 8),
    "heads that fill no vectors": (6, 2, 100),
}


def filled_cache(h, n_ctx, float32):
    """A cache of n_ctx tokens in two layers, in which what must not be looked at is not a number."""
    cache = Cache.of(h, n_ctx + 3, float32=float32)
    cache.keys[:], cache.values[:] = np.nan, np.nan
    cache.keys[1, :, :n_ctx] = numbers(h.n_kv_heads, n_ctx, h.head_dim, spread=2, seed=2)
    cache.values[1, :, :n_ctx] = numbers(h.n_kv_heads, n_ctx, h.head_dim, seed=3)
    return cache


def hparams_of(n_heads, n_kv_heads, head_dim):
    return Hyperparameters(**{**vars(TINY), "n_layers": 2, "n_heads": n_heads, "n_kv_heads": n_kv_heads,
                              "head_dim": head_dim, "max_seq_len": 1000})  # fmt: skip


@pytest.mark.parametrize("float32", [True, False], ids=["float32", "float16"])
@pytest.mark.parametrize(("n_tokens", "n_past"), [(1, 0), (1, 40), (1, 300), (2, 0), (45, 0), (19, 64), (70, 13)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_is_torchs(shape, n_tokens, n_past, float32):
    h = hparams_of(*shape)
    n_ctx = n_past + n_tokens
    cache = filled_cache(h, n_ctx, float32)
    cache.n_past = n_past
    q = numbers(n_tokens, h.n_heads, h.head_dim)
    keys, values = (torch.from_numpy(part[1, :, :n_ctx].astype(np.float32)) for part in (cache.keys, cache.values))
    seen = torch.ones(n_tokens, n_ctx, dtype=torch.bool).tril(n_past)
    expected = functional.scaled_dot_product_attention(
        torch.from_numpy(q).swapaxes(0, 1), keys, values, attn_mask=seen, enable_gqa=True
    ).swapaxes(0, 1)
    np.testing.assert_allclose(fused.attend(q, cache, 1), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("n_tokens", [1, 20])
def test_what_is_no_number_stays_none(n_tokens, wrong):
    """A key that is none makes none of every token that sees it, and of no other."""
    h = hparams_of(4, 2, 32)
    cache = filled_cache(h, 60, True)
    cache.n_past = 60 - n_tokens
    cache.keys[1, 0, 60 - n_tokens // 2 - 1, 5] = wrong
    found = fused.attend(np.abs(numbers(n_tokens, 4, 32)), cache, 1)
    sound = np.isfinite(found).all(axis=2)  # (n_tokens, n_heads)
    assert not sound[n_tokens - n_tokens // 2 - 1 :, :2].any()
    assert sound[: n_tokens - n_tokens // 2 - 1].all()
    assert sound[:, 2:].all()


@pytest.mark.parametrize(("n_tokens", "n_past"), [(1, 300), (70, 13)])
def test_any_number_of_threads_finds_the_same(n_tokens, n_past):
    h = hparams_of(8, 4, 64)
    cache = filled_cache(h, n_tokens + n_past, False)
    cache.n_past = n_past
    q, before = numbers(n_tokens, 8, 64), team().n_threads
    found = []
    for n_threads in (1, 2, 3):
        team(n_threads)
        found.append(fused.attend(q, cache, 1).tobytes())
    team(before)
    assert len(set(found)) == 1
