"""`params.json` of a Meta checkpoint, and what follows from it for each family of LLaMA.

The file states little: a Llama 3.2 says `use_scaled_rope` but not by how much, a LLaMA 1 says `"vocab_size": -1`, none
states its context. What is missing is derived here, each time with its reason, as a Note that names the option to
choose otherwise. Sources: llama-models (models/llama3/args.py, models/sku_list.py), the params.json of the releases.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..checkpoint import Hyperparameters, Note, RopeScaling
from ..errors import FormatError, UnsupportedError, in_file
from .impostors import refuse_impostor

# Keys that are understood, with the type of their value. `true` is no number here.
KEYS: dict[str, type] = {
    "dim": int,
    "n_layers": int,
    "n_heads": int,
    "n_kv_heads": int,
    "head_dim": int,
    "vocab_size": int,
    "multiple_of": int,
    "ffn_dim_multiplier": float,
    "norm_eps": float,
    "rope_theta": float,
    "use_scaled_rope": bool,
    "max_seq_len": int,
    "max_batch_size": int,  # how Meta's server was set up; says nothing of the model
}
REQUIRED = ("dim", "n_layers", "n_heads")
# Keys of models that are something else than a LLaMA text model in 16 or 32 bits.
ELSEWHERE = {
    "moe": "a mixture of experts",
    "moe_args": "a mixture of experts",
    "vision_args": "a vision model",
    "vision_chunk_size": "a vision model",
    "vision_num_cross_attention_layers": "a vision model",
    "sliding_window": "attention in a sliding window",
    "quantization_args": "weights that Meta quantized",
    "lora_args": "a LoRA adapter",
}
ARTICLES = {int: "a whole number", float: "a number", bool: "true or false"}
OPEN = ("vocab_size", -1)  # how params.json leaves the vocabulary to the tokenizer
MAX_LAYERS = 1024
MAX_PARAMS_NBYTES = 1 << 20


@dataclass(frozen=True)
class Overrides:
    """What the user states in place of what would be derived; None where nothing is stated."""

    context: int | None = None
    rope_theta: float | None = None
    rope_factor: float | None = None
    norm_eps: float | None = None


def read_params(path: Path) -> dict[str, Any]:
    """The checked contents of params.json. Raises FormatError, or UnsupportedError for another kind of model."""
    with in_file(path):
        with open(path, "rb") as file:
            text = file.read(MAX_PARAMS_NBYTES + 1)
        if len(text) > MAX_PARAMS_NBYTES:
            raise FormatError(f"over {MAX_PARAMS_NBYTES} bytes long, where a few hundred are usual")
        refuse_impostor(text[:512], len(text))
        try:
            params = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"not JSON: {error}") from error
        if isinstance(params, dict) and isinstance(params.get("model"), dict):
            params = params["model"]
        if not isinstance(params, dict):
            raise FormatError("a JSON object is required, with keys such as 'dim' and 'n_layers'")
        for key, value in params.items():
            _check(key, value)
        for key in REQUIRED:
            if key not in params:
                raise FormatError("required, but missing", where=f"key '{key}'")
        return params


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    params = dict(pairs)
    if len(params) < len(pairs):
        raise ValueError("a key occurs twice")
    return params


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check(key: str, value: Any) -> None:
    if key in ELSEWHERE and value is not None:
        raise UnsupportedError(f"this is {ELSEWHERE[key]}, which is not supported", where=f"key '{key}'")
    if key not in KEYS and key not in ELSEWHERE:
        near = get_close_matches(key, KEYS, n=1)
        raise FormatError(
            f"unknown key {key!r}",
            todo=(f"Did you mean '{near[0]}'? " if near else "")
            + "Ignoring it could change the model's output; see docs/reference/hyperparameters.md",
        )
    if value is None or key in ELSEWHERE:
        return
    wanted = KEYS[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (isinstance(value, bool) if wanted is bool else is_number and (wanted is float or value % 1 == 0)):
        raise FormatError(f"{value!r} where {ARTICLES[wanted]} is required", where=f"key '{key}'")
    if is_number and not (0 < value <= MAX_LAYERS if key == "n_layers" else 0 < value < 2**31) and (key, value) != OPEN:
        raise FormatError(f"{value} is out of range", where=f"key '{key}'")


def derive(
    params: Mapping[str, Any],
    *,
    hidden_dim: int,
    vocab_size: int,
    byte_level: bool | None,
    overrides: Overrides,
) -> tuple[Hyperparameters, tuple[Note, ...]]:
    """Hyperparameters from `params` and from what the tensors' shapes say (hidden_dim, vocab_size).

    byte_level: True for a tiktoken vocabulary (Llama 3), False for SentencePiece (before), None where there is none.
    Raises FormatError where params.json contradicts itself or the tensors.
    """
    dim, n_layers, n_heads = (int(params[key]) for key in REQUIRED)
    n_kv_heads = int(params.get("n_kv_heads") or n_heads)
    head_dim = int(params.get("head_dim") or dim // n_heads)
    if not params.get("head_dim") and dim % n_heads:
        raise FormatError(f"dim {dim} does not divide by n_heads {n_heads}, and no head_dim is stated")
    if n_heads % n_kv_heads:
        raise FormatError(f"n_heads {n_heads} does not divide by n_kv_heads {n_kv_heads}")
    if head_dim % 2:
        raise FormatError(f"head_dim {head_dim} is odd, and rotary embedding turns pairs")

    family, evidence = family_of(params, vocab_size, byte_level)
    notes = [Note("family", family.name, evidence)]
    stated_vocab = params.get("vocab_size", -1)
    if stated_vocab == -1:
        notes.append(Note("vocab_size", str(vocab_size), "the rows of tok_embeddings.weight"))
    elif stated_vocab != vocab_size:
        raise FormatError(f"{stated_vocab}, but tok_embeddings.weight has {vocab_size} rows", where="key 'vocab_size'")
    formula = hidden_dim_by_formula(dim, params.get("multiple_of"), params.get("ffn_dim_multiplier"))
    if formula not in (None, hidden_dim):
        reason = f"the rows of feed_forward.w1.weight; the formula in Meta's code gives {formula}"
        notes.append(Note("hidden_dim", str(hidden_dim), reason))

    def settle(what: str, override: float | None, stated: float | None, derived: float, reason: str) -> float:
        option = f"--{what.replace('_', '-')}"
        if override is not None:
            notes.append(Note(what, f"{override:g}", f"as {option} says"))
            return override
        if stated is not None:
            return stated
        notes.append(Note(what, f"{derived:g}", f"{reason}; the files do not say", option))
        return derived

    whose = f"{family.name}'s"
    norm_eps = settle("norm_eps", overrides.norm_eps, params.get("norm_eps"), NORM_EPS, "the default in Meta's code")
    rope_theta = settle("rope_theta", overrides.rope_theta, params.get("rope_theta"), family.rope_theta, whose)
    context = settle("context", overrides.context, params.get("max_seq_len"), family.context, whose)
    factor = 1.0
    if params.get("use_scaled_rope") or overrides.rope_factor is not None:
        factor = settle("rope_factor", overrides.rope_factor, None, family.rope_factor, whose)
    hparams = Hyperparameters(
        dim=dim,
        hidden_dim=hidden_dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        norm_eps=norm_eps,
        rope_theta=rope_theta,
        max_seq_len=int(context),
        rope_scaling=RopeScaling(factor) if factor != 1 else None,
    )
    return hparams, tuple(notes)


def hidden_dim_by_formula(dim: int, multiple_of: int | None, multiplier: float | None) -> int | None:
    """The width of the feed-forward layer by Meta's formula (llama-models, FeedForward), None without multiple_of."""
    if multiple_of is None:
        return None
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


@dataclass(frozen=True)
class Family:
    """What the files of one of Meta's families leave out: context in tokens, rope_theta, factor of scaled RoPE."""

    name: str
    context: int
    rope_theta: float
    rope_factor: float = 8


LLAMA_1 = Family("LLaMA 1", 2048, 1e4)
LLAMA_2 = Family("Llama 2", 4096, 1e4)
CODE_LLAMA = Family("Code Llama", 16384, 1e6)
CODE_LLAMA_SHORT = Family("Code Llama 70B Instruct or Python", 4096, 1e4)
LLAMA_3 = Family("Llama 3", 8192, 5e5)
LLAMA_3_1 = Family("Llama 3.1", 131072, 5e5)
LLAMA_3_2 = Family("Llama 3.2", 131072, 5e5, rope_factor=32)

LLAMA_3_2_SHAPES = {(2048, 16), (3072, 28)}  # (dim, n_layers) of its text models
NORM_EPS = 1e-5  # the default in Meta's code


def family_of(params: Mapping[str, Any], vocab_size: int, byte_level: bool | None) -> tuple[Family, str]:
    """The family a checkpoint belongs to, and what shows it. Arguments as for `derive`."""
    theta, shape = params.get("rope_theta"), (params["dim"], params["n_layers"])
    if byte_level or (byte_level is None and vocab_size == 128256):
        if not params.get("use_scaled_rope"):
            return LLAMA_3, "a tiktoken vocabulary and no scaled RoPE"
        if shape in LLAMA_3_2_SHAPES:
            return LLAMA_3_2, f"scaled RoPE, dim {shape[0]} and {shape[1]} layers"
        return LLAMA_3_1, "a tiktoken vocabulary and scaled RoPE"
    if theta is not None and theta > 10000:
        return CODE_LLAMA, f"a SentencePiece vocabulary and rope_theta {theta:g}"
    if vocab_size == 32016:
        family = CODE_LLAMA_SHORT if shape == (8192, 80) else CODE_LLAMA
        return family, f"a SentencePiece vocabulary of {vocab_size} pieces and {shape[1]} layers"
    if params.get("norm_eps") == 1e-6:
        return LLAMA_1, "norm_eps 1e-06"
    if shape == (8192, 80) and not params.get("n_kv_heads"):
        return LLAMA_1, "the 65B shape without grouped-query attention"
    return LLAMA_2, f"a SentencePiece vocabulary and norm_eps {params.get('norm_eps', NORM_EPS):g}"
