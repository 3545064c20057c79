"""The oracle itself, against transformers, sentencepiece and tiktoken."""

import base64
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from llamatools_runtime.oracle import Oracle
from llamatools_runtime.oracle_text import _by_rank, original_encoder
from tiktoken.load import load_tiktoken_bpe
from tiny_llamas import SHARED, STORIES, TINY, checkpoint_of, hf_rows, needs_stories, random_weights
from transformers import LlamaConfig, LlamaForCausalLM

from llamatools.checkpoint import RopeScaling
from llamatools.dtypes import BF16
from llamatools.errors import FormatError, UnsupportedError, UsageError

IDS = np.random.default_rng(1).integers(0, TINY.vocab_size, TINY.max_seq_len).tolist()
LLAMA3 = SHARED / "data" / "tokenizers" / "llama3.tiktoken"
needs_llama3 = pytest.mark.skipif(not LLAMA3.exists(), reason="needs ../shared/data/tokenizers")

TEXTS = [
    "Hello, world!",
    "",
    " leading,  double and trailing spaces  ",
    "déjà vu, naïve, ½ ₽ € \u00a0\u2003",
    "東京は日本の首都です。안녕하세요",
    "🦙🏽👩‍👩‍👧 \U0001f9ff",
    "1234567 3.14159 2026-11-23",
    "line\nline\r\n\r\n\n\ttab \t\n  x",
    "they'LL don't I'm we've",
    "def f(x):\n    return x ** 2  # square\n",
]

HF_NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}


def in_transformers(weights, h):
    scaling = h.rope_scaling and {
        "rope_type": "llama3",
        "factor": h.rope_scaling.factor,
        "low_freq_factor": h.rope_scaling.low_freq_factor,
        "high_freq_factor": h.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": h.rope_scaling.old_context,
        "rope_theta": h.rope_theta,
    }
    config = LlamaConfig(
        vocab_size=h.vocab_size, hidden_size=h.dim, intermediate_size=h.hidden_dim, num_hidden_layers=h.n_layers,
        num_attention_heads=h.n_heads, num_key_value_heads=h.n_kv_heads, head_dim=h.head_dim, rms_norm_eps=h.norm_eps,
        max_position_embeddings=h.max_seq_len, tie_word_embeddings=False, attn_implementation="eager",
        rope_parameters=scaling or {"rope_type": "default", "rope_theta": h.rope_theta},
    )  # fmt: skip
    state = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    rows = {"attention.wq": hf_rows(h.n_heads, h.head_dim), "attention.wk": hf_rows(h.n_kv_heads, h.head_dim)}
    for n in range(h.n_layers):
        for meta, hf in HF_NAMES.items():
            weight = weights[f"layers.{n}.{meta}.weight"]
            state[f"model.layers.{n}.{hf}.weight"] = weight[rows[meta]] if meta in rows else weight
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return model


VARIANTS = {
    "plain": TINY,
    "wide heads, theta 500000": replace(TINY, head_dim=12, rope_theta=500000.0),
    "scaled rotary embedding": replace(TINY, rope_scaling=RopeScaling(8.0, 1.0, 4.0, old_context=64)),
    "scaled, 3.2's factor": replace(TINY, rope_theta=5e5, rope_scaling=RopeScaling(32.0, old_context=64)),
}


@pytest.mark.parametrize("hparams", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_hidden_states_are_those_of_transformers(hparams):
    weights = random_weights(hparams)
    with torch.inference_mode():
        expected = in_transformers(weights, hparams)(torch.tensor([IDS]), output_hidden_states=True)

    oracle = Oracle(checkpoint_of(weights, hparams))
    states = list(oracle.hidden_states(IDS))

    assert len(states) == hparams.n_layers
    for found, state in zip(states[:-1], expected.hidden_states[1:-1], strict=True):  # their last one is normed
        np.testing.assert_allclose(found, state[0], atol=1e-4 * float(state.abs().max()))
    logits = expected.logits[0].numpy()
    np.testing.assert_allclose(oracle.logits(states[-1]), logits, atol=1e-4 * np.sqrt(np.mean(logits**2)))


def test_frequencies_of_llama_3_2():
    """Heads of 64, factor 32: the divisors that the format facts list."""
    h = replace(TINY, head_dim=64, rope_theta=500000.0)
    plain = Oracle(checkpoint_of({}, h)).frequencies()
    scaled = Oracle(checkpoint_of({}, replace(h, rope_scaling=RopeScaling(32.0)))).frequencies()
    np.testing.assert_allclose((plain / scaled)[14:19], [1, 1.651329, 3.292262, 9.666729, 32], rtol=1e-5)


def test_a_tied_output_uses_the_embedding():
    weights = random_weights(TINY)
    tied = {name: array for name, array in weights.items() if name != "output.weight"}
    weights["output.weight"] = weights["tok_embeddings.weight"]
    logits = []
    for w in (weights, tied):
        oracle = Oracle(checkpoint_of(w, TINY))
        *_, last = oracle.hidden_states(IDS)
        logits.append(oracle.logits(last))
    np.testing.assert_array_equal(*logits)


def test_bf16_weights_are_computed_with_in_float32():
    weights = {name: torch.from_numpy(array).bfloat16().float().numpy() for name, array in random_weights(TINY).items()}
    *_, wide = Oracle(checkpoint_of(weights, TINY)).hidden_states(IDS)
    *_, narrow = Oracle(checkpoint_of(weights, TINY, BF16)).hidden_states(IDS)
    np.testing.assert_array_equal(wide, narrow)


def test_a_checkpoint_of_another_kind_is_refused():
    checkpoint = checkpoint_of(random_weights(TINY), TINY)
    for other in (replace(checkpoint, scheme="hf"), replace(checkpoint, hparams=None)):
        with pytest.raises(UsageError, match=r"original: not a Meta checkpoint with its params\.json"):
            Oracle(other)


def test_an_original_that_is_not_finite_is_refused():
    weights = random_weights(TINY)
    weights["layers.1.ffn_norm.weight"][3] = np.inf
    with pytest.raises(FormatError, match="original: layer 1: the original itself computes NaN or infinity here"):
        list(Oracle(checkpoint_of(weights, TINY)).hidden_states(IDS))


def test_missing_torch_is_said_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "llamatools_runtime.oracle")
    with pytest.raises(UnsupportedError, match=r"takes torch, which is not installed\. pip install torch --index-url"):
        import llamatools_runtime.oracle  # noqa: F401


@needs_stories
def test_a_sentencepiece_model_encodes_as_sentencepiece_does():
    from sentencepiece import SentencePieceProcessor

    path = STORIES / "tokenizer.model"
    encode, expected = original_encoder(path), SentencePieceProcessor(model_file=str(path), add_bos=True)
    assert [encode(text) for text in TEXTS] == expected.encode(TEXTS)


@needs_llama3
@pytest.mark.parametrize("library", [True, False], ids=["tiktoken", "without tiktoken"])
def test_a_tiktoken_file_encodes_as_metas_tokenizer_does(library, monkeypatch):
    pattern = (  # as in the `tokenizers` conversion of transformers, convert_llama_weights_to_hf.py
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    theirs = tiktoken.Encoding(
        "llama3", pat_str=pattern, mergeable_ranks=load_tiktoken_bpe(str(LLAMA3)), special_tokens={}
    )
    if not library:
        monkeypatch.setitem(sys.modules, "tiktoken", None)
    encode = original_encoder(LLAMA3)
    assert [encode(text) for text in TEXTS] == [[128000, *theirs.encode_ordinary(text)] for text in TEXTS]


def test_merging_by_rank_takes_the_lowest_first():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258, b"bcd": 259}
    encoding = tiktoken.Encoding("few", pat_str=".+", mergeable_ranks=ranks, special_tokens={})
    for text in ("abcd", "bcd", "ab", "aabbccdd", "bcabcdab"):
        assert _by_rank(ranks)(text) == encoding.encode_ordinary(text)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    path: Path = tmp_path / "tokenizer.model"
    path.write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(FormatError, match=r"tokenizer\.model: neither a SentencePiece model nor a tiktoken file"):
        original_encoder(path)
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="neither a SentencePiece model nor a tiktoken file"):
        original_encoder(path)
    path.write_bytes(base64.b64encode(b"a") + b" 0\nrubbish\n")
    with pytest.raises(FormatError, match=r"tokenizer\.model: line 2: not a token in base64 and its rank"):
        original_encoder(path)
    path.write_bytes(base64.b64encode(b"a") + b" 1\n")
    with pytest.raises(FormatError, match=r"not a whole vocabulary: of 1 tokens, rank or byte 0 is missing"):
        original_encoder(path)
    path.write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(77)))
    with pytest.raises(FormatError, match=r"not a whole vocabulary: of 77 tokens, rank or byte 77 is missing"):
        original_encoder(path)
