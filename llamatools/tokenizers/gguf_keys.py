"""The `tokenizer.*` keys of a GGUF file, from and to a Tokenizer, with the value types that llama.cpp demands."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..checkpoint import Tokenizer
from ..errors import FormatError, Report, refuse
from ..metadata import Kind, Metadata, Value, array, boolean, string, strings, u32

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
# Role of a token -> its key, below PREFIX.
ROLE_KEYS = {
    role: f"{role}_token_id"
    for role in ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pre", "fim_suf", "fim_mid")
}
# What llama.cpp takes where a key is missing, by the kind of vocabulary (llama-vocab.cpp).
DEFAULT_ROLES = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {"bos": 11, "eos": 11}}


def to_metadata(tokenizer: Tokenizer) -> dict[str, Value]:
    """The keys of a vocabulary; empty arrays and texts are left out."""
    t = tokenizer
    keys = {
        "model": string(t.model),
        "pre": string(t.pre),
        "tokens": strings(t.tokens),
        "scores": None if t.scores is None else array(Kind.FLOAT32, t.scores),
        "token_type": array(Kind.INT32, t.types),
        "merges": strings(t.merges) if len(t.merges) else None,
        **{key: u32(t.special[role]) for role, key in ROLE_KEYS.items() if role in t.special},
        "add_bos_token": boolean(t.add_bos),
        "add_eos_token": boolean(t.add_eos),
        "add_space_prefix": boolean(t.add_space_prefix) if t.model == "llama" else None,
    }
    metadata = {PREFIX + key: value for key, value in keys.items() if value is not None}
    return metadata | ({TEMPLATE: string(t.chat_template)} if t.chat_template else {})


def from_metadata(metadata: Metadata, report: Report = refuse) -> Tokenizer | None:
    """The vocabulary of a GGUF file, None where it has none. Token texts stay where they are until asked for.

    report: is told of columns and ids that do not fit; if it does not raise, they are left out.
    Raises FormatError for a key of the wrong type, arrays of unequal length and ids outside of the vocabulary.
    """
    if PREFIX + "model" not in metadata:
        return None
    model = _get(metadata, "model", Kind.STRING)
    tokens = _get(metadata, "tokens", Kind.STRING, is_array=True)
    if tokens is None:
        if model in ("none", "no_vocab"):
            return None
        raise FormatError("required, but missing", where=f"key '{PREFIX}tokens'", code="key-missing")
    n = len(tokens)
    scores = _get(metadata, "scores", Kind.FLOAT32, is_array=True)
    types = _get(metadata, "token_type", Kind.INT32, is_array=True)
    for key, column in (("scores", scores), ("token_type", types)):
        if column is not None and len(column) != n:
            what = f"{len(column)} items for {n} tokens"
            report(FormatError(what, where=f"key '{PREFIX}{key}'", code="vocabulary"))
    special = {}
    for role, key in ROLE_KEYS.items():
        id_ = _get(metadata, key, Kind.UINT32)
        if id_ is None:
            id_ = DEFAULT_ROLES.get(model, {}).get(role)
            if id_ is None or id_ >= n:
                continue
        elif id_ >= n and id_ != 0xFFFFFFFF:  # how some writers spell "none"
            what = f"id {id_}, but there are {n} tokens"
            report(FormatError(what, where=f"key '{PREFIX}{key}'", code="special-id"))
        if id_ < n:
            special[role] = id_
    template = metadata.get(TEMPLATE)
    return Tokenizer(
        model=model,
        pre=_get(metadata, "pre", Kind.STRING) or "default",
        tokens=tokens,
        scores=None if scores is None or len(scores) != n else scores,
        types=np.ones(n, np.int32) if types is None or len(types) != n else types,
        merges=() if (merges := _get(metadata, "merges", Kind.STRING, is_array=True)) is None else merges,
        special=special,
        add_bos=_flag(metadata, "add_bos_token", model == "llama"),
        add_eos=_flag(metadata, "add_eos_token", False),
        add_space_prefix=_flag(metadata, "add_space_prefix", model == "llama"),
        chat_template=template.data if template and template.kind is Kind.STRING else None,
    )


def _get(metadata: Metadata, key: str, kind: Kind, *, is_array: bool = False) -> Any:
    """The data of a key, None where it is missing. Raises FormatError for another type."""
    value = metadata.get(PREFIX + key)
    if value is None:
        return None
    found = value.item if is_array and value.kind is Kind.ARRAY else value.kind
    if found is not kind or (value.kind is Kind.ARRAY) is not is_array:
        wanted = f"an array of {kind}" if is_array else f"{kind}"
        raise FormatError(f"{value.kind} where {wanted} is required", where=f"key '{PREFIX}{key}'", code="key-type")
    return value.data


def _flag(metadata: Metadata, key: str, default: bool) -> bool:
    value = _get(metadata, key, Kind.BOOL)
    return default if value is None else bool(value)
