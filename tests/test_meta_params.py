"""params.json: what it says, what it leaves out, and what is refused. The expected values are the published models'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamatools.checkpoint import Hyperparameters
from llamatools.errors import FormatError, UnsupportedError
from llamatools.formats.meta_params import Overrides, derive, hidden_dim_by_formula, read_params

# The params.json of the releases, and what is known of the models from their papers and configurations:
# name -> (params.json, hidden_dim, rows of the embedding, tiktoken?, context, rope_theta, norm_eps, rope factor)
RELEASES: dict[str, tuple[dict[str, Any], int, int, bool, int, float, float, float | None]] = {
    "LLaMA 1 7B": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1},
        11008, 32000, False, 2048, 1e4, 1e-6, None,
    ),
    "LLaMA 1 65B": (
        {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
        22016, 32000, False, 2048, 1e4, 1e-5, None,
    ),
    "Llama 2 7B": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1},
        11008, 32000, False, 4096, 1e4, 1e-5, None,
    ),
    "Llama 2 70B": (
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
         "norm_eps": 1e-05, "vocab_size": -1},
        28672, 32000, False, 4096, 1e4, 1e-5, None,
    ),
    "Code Llama 7B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5,
         "rope_theta": 1000000},
        11008, 32016, False, 16384, 1e6, 1e-5, None,
    ),
    "Code Llama 34B": (
        {"dim": 8192, "n_layers": 48, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 256, "ffn_dim_multiplier": 1.0,
         "norm_eps": 1e-5, "rope_theta": 1000000},
        22016, 32000, False, 16384, 1e6, 1e-5, None,
    ),
    "Code Llama 70B Instruct": (
        {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3,
         "norm_eps": 1e-5, "rope_theta": 10000, "vocab_size": 32016},
        28672, 32016, False, 4096, 1e4, 1e-5, None,
    ),
    "Llama 3 8B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
         "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0},
        14336, 128256, True, 8192, 5e5, 1e-5, None,
    ),
    "Llama 3.1 70B": (
        {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 4096,
         "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True},
        28672, 128256, True, 131072, 5e5, 1e-5, 8,
    ),
    "Llama 3.1 405B": (
        {"dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 4096,
         "ffn_dim_multiplier": 1.2, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True},
        53248, 128256, True, 131072, 5e5, 1e-5, 8,
    ),
    "Llama 3.2 1B": (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256,
         "ffn_dim_multiplier": 1.5, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True},
        8192, 128256, True, 131072, 5e5, 1e-5, 32,
    ),
    "Llama 3.2 3B": (
        {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256,
         "ffn_dim_multiplier": 1.0, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True},
        8192, 128256, True, 131072, 5e5, 1e-5, 32,
    ),
}  # fmt: skip

TINY: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 8}


def derived(params: dict[str, Any], **changes: Any) -> Hyperparameters:
    facts = {"hidden_dim": 172, "vocab_size": 512, "byte_level": False, "overrides": Overrides(), **changes}
    return derive(params, **facts)[0]


@pytest.mark.parametrize("release", RELEASES)
def test_published_models(release: str) -> None:
    params, hidden_dim, vocab_size, byte_level, context, theta, eps, factor = RELEASES[release]
    h = derived(params, hidden_dim=hidden_dim, vocab_size=vocab_size, byte_level=byte_level)
    assert (h.max_seq_len, h.rope_theta, h.norm_eps) == (context, theta, eps)
    assert (h.rope_scaling.factor if h.rope_scaling else None) == factor
    assert h.n_kv_heads == params.get("n_kv_heads", params["n_heads"])
    assert h.head_dim == params["dim"] // params["n_heads"]
    assert hidden_dim_by_formula(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier")) == hidden_dim


def test_every_derived_value_is_told_with_its_reason_and_option() -> None:
    params = RELEASES["Llama 3.2 1B"][0]
    _, notes = derive(params, hidden_dim=8192, vocab_size=128256, byte_level=True, overrides=Overrides())
    told = {note.what: note for note in notes}
    assert told["rope_factor"].value == "32"
    assert told["rope_factor"].option == "--rope-factor"
    assert told["context"].value == "131072"
    assert told["context"].reason == "Llama 3.2's; the files do not say"
    assert told["family"].reason == "scaled RoPE, dim 2048 and 16 layers"


def test_without_a_tokenizer_the_vocabulary_shows_the_generation() -> None:
    params = RELEASES["Llama 3 8B"][0]
    assert derived(params, hidden_dim=14336, vocab_size=128256, byte_level=None).max_seq_len == 8192


def test_what_the_user_states_wins() -> None:
    overrides = Overrides(context=512, rope_theta=12345.0, rope_factor=4.0, norm_eps=1e-3)
    h = derived({**TINY, "norm_eps": 1e-5, "rope_theta": 1e4, "max_seq_len": 99}, overrides=overrides)
    assert (h.max_seq_len, h.rope_theta, h.norm_eps) == (512, 12345.0, 1e-3)
    assert h.rope_scaling is not None
    assert h.rope_scaling.factor == 4.0
    assert derived({**TINY, "use_scaled_rope": True}, overrides=Overrides(rope_factor=1.0)).rope_scaling is None


def test_a_stated_context_is_kept() -> None:
    assert derived({**TINY, "max_seq_len": 99}).max_seq_len == 99


def test_an_unusual_hidden_dim_is_told() -> None:
    _, notes = derive(
        {**TINY, "multiple_of": 32}, hidden_dim=172, vocab_size=512, byte_level=False, overrides=Overrides()
    )
    note = next(note for note in notes if note.what == "hidden_dim")
    assert note.reason == "the rows of feed_forward.w1.weight; the formula in Meta's code gives 192"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 65}, "dim 65 does not divide by n_heads 8, and no head_dim is stated"),
        ({"n_kv_heads": 3}, "n_heads 8 does not divide by n_kv_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd, and rotary embedding turns pairs"),
        ({"vocab_size": 500}, "key 'vocab_size': 500, but tok_embeddings.weight has 512 rows"),
    ],
)
def test_contradictions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        derived({**TINY, **changes})


def read(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "params.json"
    path.write_text(text)
    return read_params(path)


def test_params_may_be_wrapped(tmp_path: Path) -> None:
    assert read(tmp_path, json.dumps({"model": TINY})) == TINY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>", "params.json: a web page of 6 bytes, not a model"),
        ("dim: 64", "params.json: not JSON"),
        ("[" * 100_000, "params.json: not JSON"),
        ('{"dim": 1, "dim": 2}', "not JSON: a key occurs twice"),
        ('{"dim": NaN}', "not JSON: NaN is no number of JSON"),
        ("[]", "params.json: a JSON object is required, with keys such as 'dim' and 'n_layers'"),
        ('{"dim": 64, "n_layers": 2}', "params.json: key 'n_heads': required, but missing"),
        (
            json.dumps({**TINY, "rope_scaling_factor": 8}),
            "params.json: unknown key 'rope_scaling_factor'. Ignoring it could change the model's output; "
            "see docs/reference/hyperparameters.md",
        ),
        (json.dumps({**TINY, "n_layer": 8}), r"unknown key 'n_layer'. Did you mean 'n_layers'\? Ignoring it"),
        (json.dumps({**TINY, "dim": "64"}), "key 'dim': '64' where a whole number is required"),
        (json.dumps({**TINY, "dim": 64.5}), "key 'dim': 64.5 where a whole number is required"),
        (json.dumps({**TINY, "norm_eps": True}), "key 'norm_eps': True where a number is required"),
        (json.dumps({**TINY, "use_scaled_rope": 1}), "key 'use_scaled_rope': 1 where true or false is required"),
        (json.dumps({**TINY, "dim": -64}), "key 'dim': -64 is out of range"),
        (json.dumps({**TINY, "n_layers": 10**9}), "key 'n_layers': 1000000000 is out of range"),
        ('{"dim": 64, "n_layers": 2, "n_heads": 8, "norm_eps": 1e999}', "key 'norm_eps': inf is out of range"),
        ('{"dim": 64, "n_layers": 2, "n_heads": 1e999}', "key 'n_heads': inf where a whole number is required"),
        (" " * (1 << 21), "over 1048576 bytes long, where a few hundred are usual"),
    ],
)
def test_bad_params(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("key", "what"),
    [("moe", "a mixture of experts"), ("vision_chunk_size", "a vision model"), ("lora_args", "a LoRA adapter")],
)
def test_other_kinds_of_models(tmp_path: Path, key: str, what: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"key '{key}': this is {what}, which is not supported"):
        read(tmp_path, json.dumps({**TINY, key: 4}))


def test_null_means_absent(tmp_path: Path) -> None:
    params = read(tmp_path, json.dumps({**TINY, "rope_theta": None, "vision_chunk_size": None}))
    assert derived(params).rope_theta == 1e4
