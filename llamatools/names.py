"""Tensor names and hyperparameter keys, per scheme, as tables. Meta is the hub; the inverses are derived.

Sources: llama-models' models/llama3/model.py for Meta's names, llama.cpp's gguf-py constants for GGUF's.
GGUF stores wq and wk in Meta's row order (rotary pairs are neighbours), so between the two only names change.
"""

from __future__ import annotations

import re
from typing import Any

from .checkpoint import Hyperparameters
from .errors import FormatError
from .metadata import Kind, Metadata, Value, f32, u32

# A layer's tensors are `layers.N.<left>` in a Meta checkpoint and `blk.N.<right>` in GGUF.
LAYER_TENSORS = {
    "attention_norm.weight": "attn_norm.weight",
    "attention.wq.weight": "attn_q.weight",
    "attention.wk.weight": "attn_k.weight",
    "attention.wv.weight": "attn_v.weight",
    "attention.wo.weight": "attn_output.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
}
EMBEDDING, NORM, OUTPUT = "tok_embeddings.weight", "norm.weight", "output.weight"
MODEL_TENSORS = {EMBEDDING: "token_embd.weight", NORM: "output_norm.weight", OUTPUT: "output.weight"}

# The divisors of scaled rotary embedding. Not to be confused with Meta's `rope.freqs`, which are frequencies.
ROPE_FACTORS = "rope_freqs.weight"

# Buffers that old checkpoints carry and that follow from the hyperparameters.
DROPPED = re.compile(r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs")


def meta_names(n_layers: int) -> list[str]:
    """The names of a Meta checkpoint's tensors in the order of execution."""
    layers = [f"layers.{n}.{tensor}" for n in range(n_layers) for tensor in LAYER_TENSORS]
    return [EMBEDDING, *layers, NORM, OUTPUT]


def meta_to_gguf(name: str) -> str:
    """GGUF's name for a tensor of a Meta checkpoint. Raises KeyError for one that is not in the tables."""
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name]
    _, n, tensor = name.split(".", 2)
    return f"blk.{n}.{LAYER_TENSORS[tensor]}"


# The right sides in Hugging Face's names, `model.layers.N.<left>`. Its q and k have rows in another order as well.
HF_LAYER_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
HF_MODEL_TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
ROTATED = ("attn_q.weight", "attn_k.weight")  # whose rows make rotary pairs


def hf_to_gguf(name: str) -> str | None:
    """GGUF's name for a tensor of a Hugging Face model, None where it has no counterpart."""
    if name in HF_MODEL_TENSORS:
        return HF_MODEL_TENSORS[name]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    return f"blk.{found[1]}.{HF_LAYER_TENSORS[found[2]]}" if found and found[2] in HF_LAYER_TENSORS else None


_GGUF_MODEL = {gguf: meta for meta, gguf in MODEL_TENSORS.items()}
_GGUF_LAYER = {gguf: meta for meta, gguf in LAYER_TENSORS.items()}


def gguf_to_meta(name: str) -> str | None:
    """The name a GGUF tensor has in a Meta checkpoint, None where it has no counterpart."""
    if name in _GGUF_MODEL:
        return _GGUF_MODEL[name]
    prefix, _, rest = name.partition(".")
    n, _, tensor = rest.partition(".")
    return f"layers.{n}.{_GGUF_LAYER[tensor]}" if prefix == "blk" and n.isdigit() and tensor in _GGUF_LAYER else None


def shapes(hparams: Hyperparameters) -> dict[str, tuple[int, ...]]:
    """What shape each tensor of a Meta checkpoint must have, in the order of execution. Matrices are (out, in)."""
    h = hparams
    per_layer: dict[str, tuple[int, ...]] = {
        "attention_norm.weight": (h.dim,),
        "attention.wq.weight": (h.n_heads * h.head_dim, h.dim),
        "attention.wk.weight": (h.n_kv_heads * h.head_dim, h.dim),
        "attention.wv.weight": (h.n_kv_heads * h.head_dim, h.dim),
        "attention.wo.weight": (h.dim, h.n_heads * h.head_dim),
        "ffn_norm.weight": (h.dim,),
        "feed_forward.w1.weight": (h.hidden_dim, h.dim),
        "feed_forward.w3.weight": (h.hidden_dim, h.dim),
        "feed_forward.w2.weight": (h.dim, h.hidden_dim),
    }
    per_model = {EMBEDDING: (h.vocab_size, h.dim), NORM: (h.dim,), OUTPUT: (h.vocab_size, h.dim)}
    return {name: per_model.get(name) or per_layer[name.split(".", 2)[2]] for name in meta_names(h.n_layers)}


# Hyperparameters in GGUF: field -> (key below the architecture's name, value type that llama.cpp demands).
HPARAM_KEYS = {
    "max_seq_len": ("context_length", Kind.UINT32),
    "dim": ("embedding_length", Kind.UINT32),
    "n_layers": ("block_count", Kind.UINT32),
    "hidden_dim": ("feed_forward_length", Kind.UINT32),
    "n_heads": ("attention.head_count", Kind.UINT32),
    "n_kv_heads": ("attention.head_count_kv", Kind.UINT32),
    "norm_eps": ("attention.layer_norm_rms_epsilon", Kind.FLOAT32),
    "rope_theta": ("rope.freq_base", Kind.FLOAT32),
    "head_dim": ("rope.dimension_count", Kind.UINT32),
    "vocab_size": ("vocab_size", Kind.UINT32),
}


def hparams_to_gguf(hparams: Hyperparameters) -> dict[str, Value]:
    """The `llama.*` keys. head_dim is also the width of keys and values where it is not dim / n_heads."""
    make = {Kind.UINT32: u32, Kind.FLOAT32: f32}
    keys = {f"llama.{key}": make[kind](getattr(hparams, field)) for field, (key, kind) in HPARAM_KEYS.items()}
    if hparams.head_dim * hparams.n_heads != hparams.dim:
        keys["llama.attention.key_length"] = keys["llama.attention.value_length"] = u32(hparams.head_dim)
    return keys


def hparams_from_gguf(metadata: Metadata) -> Hyperparameters:
    """Hyperparameters from a GGUF's keys, with llama.cpp's defaults for the optional ones.

    rope_scaling stays None: GGUF stores its effect as the tensor `rope_freqs.weight`.
    Raises FormatError for a missing or mistyped key.
    """
    architecture = _value(metadata, "general.architecture", Kind.STRING)

    def number(field: str, default: float | None = None) -> float:
        key, kind = HPARAM_KEYS[field]
        value = _value(metadata, f"{architecture}.{key}", kind, default)
        if not value > 0:
            raise FormatError(f"{value} is out of range", where=f"key '{architecture}.{key}'", code="hparams")
        return float(value)

    tokens = metadata.get("tokenizer.ggml.tokens")
    dim, n_heads = int(number("dim")), int(number("n_heads"))
    default_head_dim = _value(metadata, f"{architecture}.attention.key_length", Kind.UINT32, dim // n_heads)
    return Hyperparameters(
        dim=dim,
        hidden_dim=int(number("hidden_dim")),
        n_layers=int(number("n_layers")),
        n_heads=n_heads,
        n_kv_heads=int(number("n_kv_heads", n_heads)),
        head_dim=int(number("head_dim", default_head_dim)),
        vocab_size=int(number("vocab_size", len(tokens.data) if tokens else None)),
        norm_eps=number("norm_eps"),
        rope_theta=number("rope_theta", 10000.0),
        max_seq_len=int(number("max_seq_len")),
    )


def _value(metadata: Metadata, key: str, kind: Kind, default: Any = None) -> Any:
    value = metadata.get(key)
    if value is None:
        if default is None:
            raise FormatError("required, but missing", where=f"key '{key}'", code="key-missing")
        return default
    if value.kind is not kind:
        raise FormatError(f"{value.kind} where {kind} is required", where=f"key '{key}'", code="key-type")
    return value.data
