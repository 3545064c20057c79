"""`config.json` of a Hugging Face model folder: the hyperparameters of a LLaMA.

Two generations of transformers spell rotary embedding differently: `rope_theta` and `rope_scaling` at the top, or both
in `rope_parameters`. Either is read, and both where they agree. What is missing is what transformers' LlamaConfig takes
in its place, each time with a Note. Source: transformers, models/llama/configuration_llama.py and
modeling_rope_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint import Hyperparameters, Note, RopeScaling
from ..errors import FormatError, UnsupportedError

MAX_NBYTES = 1 << 20
MAX_LAYERS = 1024
Config = Mapping[str, Any]

# What LlamaConfig takes where config.json says nothing.
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
# Keys with the only value under which the model is a LLaMA as Meta's code computes it; missing is the same.
PLAIN = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
ROPE_TYPES = ("default", "llama3")


def hyperparameters(config: Config) -> tuple[Hyperparameters, tuple[Note, ...]]:
    """The hyperparameters, and what was taken where the file says nothing.

    Raises FormatError for a missing or mistyped key and for contradictions, UnsupportedError for models that are
    computed in another way.
    """
    if config.get("model_type") != "llama":
        raise UnsupportedError(f"it is {config.get('model_type')!r}, where 'llama' is read", where="key 'model_type'")
    for key, wanted in PLAIN.items():
        if config.get(key, wanted) not in (wanted, None):
            raise UnsupportedError(f"{config[key]!r}, where a LLaMA has {wanted!r}", where=f"key {key!r}")
    rope = _rope(config)
    notes: list[Note] = []

    def number(key: str, place: Config = config) -> float:
        value = _number(place, key)
        if value is None:
            value = DEFAULTS[key]
            notes.append(Note(key, f"{value:g}", "transformers' default; config.json does not say"))
        return value

    dim, n_heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    n_kv_heads = _count(config, "num_key_value_heads", n_heads)
    head_dim = _count(config, "head_dim", dim // n_heads if dim % n_heads == 0 else None)
    if n_heads % n_kv_heads:
        raise FormatError(f"{n_heads} heads do not divide by {n_kv_heads}", where="key 'num_key_value_heads'")
    if head_dim % 2:
        raise FormatError(f"{head_dim} is odd, and rotary embedding turns pairs", where="key 'head_dim'")
    n_layers = _count(config, "num_hidden_layers")
    if n_layers > MAX_LAYERS:
        raise FormatError(f"{n_layers}, where {MAX_LAYERS} are allowed", where="key 'num_hidden_layers'")
    if config.get("tie_word_embeddings") is True:
        notes.append(Note("output", "tied", "config.json says tie_word_embeddings; the embedding serves for both"))
    hparams = Hyperparameters(
        dim=dim,
        hidden_dim=_count(config, "intermediate_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=_count(config, "vocab_size"),
        norm_eps=number("rms_norm_eps"),
        rope_theta=number("rope_theta", rope),
        max_seq_len=_whole(number("max_position_embeddings"), "max_position_embeddings"),
        rope_scaling=_scaling(rope),
    )
    return hparams, tuple(notes)


def _rope(config: Config) -> Config:
    """The keys of rotary embedding, in one place, as the newer spelling has them."""
    older = dict(_object(config, "rope_scaling"))
    if config.get("rope_theta") is not None:
        older["rope_theta"] = config["rope_theta"]
    newer = dict(_object(config, "rope_parameters"))
    for rope in (older, newer):
        if "type" in rope:  # how the first versions called it
            rope["rope_type"] = rope.pop("type")
    for key in older.keys() & newer.keys():
        if older[key] != newer[key]:
            raise FormatError(
                f"{older[key]!r} at the top or in rope_scaling, but {newer[key]!r} in rope_parameters",
                where=f"key {key!r}",
            )
    rope = older | newer
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise UnsupportedError(
            f"RoPE of type {rope['rope_type']!r}, where {' and '.join(ROPE_TYPES)} are read", where="key 'rope_type'"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        what = f"{rope['partial_rotary_factor']!r}, where a LLaMA has 1.0"
        raise UnsupportedError(what, where="key 'partial_rotary_factor'")
    return rope


def _scaling(rope: Config) -> RopeScaling | None:
    if rope.get("rope_type") != "llama3":
        return None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, context = (_number(rope, key) for key in keys)
    if factor is None or low is None or high is None or context is None:
        missing = next(key for key in keys if rope.get(key) is None)
        raise FormatError("required by RoPE of type 'llama3', but missing", where=f"key {missing!r}")
    return RopeScaling(factor, low, high, int(context))


def _object(config: Config, key: str) -> Config:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FormatError(f"{value!r} where an object is required", where=f"key {key!r}")
    return value


def _number(config: Config, key: str) -> float | None:
    """The number of a key, None where it says nothing."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
        raise FormatError(f"{value!r} where a number from 0 to 2^31 is required", where=f"key {key!r}")
    return value


def _count(config: Config, key: str, default: int | None = None) -> int:
    value = _number(config, key)
    if value is None and default is not None:
        return default
    if value is None:
        raise FormatError("required, but missing", where=f"key {key!r}")
    return _whole(value, key)


def _whole(value: float, key: str) -> int:
    if value % 1:
        raise FormatError(f"{value} where a whole number is required", where=f"key {key!r}")
    return int(value)
