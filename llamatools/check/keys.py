"""Names and metadata keys of a GGUF file: what must be there, of which type, and what should not be shown raw.

Sources: the GGUF specification (docs/gguf.md of github.com/ggml-org/ggml) and llama.cpp's load_hparams
(src/llama-model.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..layout import Layout
from ..metadata import Kind, Metadata, Value
from ..names import HPARAM_KEYS
from .finding import Finding

# Fields of a LLaMA without which it cannot be run, and those that any architecture must have.
LLAMA_FIELDS = ("max_seq_len", "dim", "n_layers", "hidden_dim", "n_heads", "norm_eps")
ANY_FIELDS = ("max_seq_len", "dim", "n_layers")

KINDS = {
    "general.architecture": Kind.STRING,
    "general.name": Kind.STRING,
    "general.type": Kind.STRING,
    "general.file_type": Kind.UINT32,
    "general.quantization_version": Kind.UINT32,
    "split.no": Kind.UINT16,
    "split.count": Kind.UINT16,
    "split.tensors.count": Kind.INT32,
    "tokenizer.chat_template": Kind.STRING,
}
PER_LAYER = ("hidden_dim", "n_heads", "n_kv_heads")  # may be arrays with an item for each layer


def check(layout: Layout) -> Iterator[Finding]:
    """Keys that are missing or of the wrong type, names that no terminal should see."""
    file = str(layout.files[0].path)
    metadata = layout.metadata
    architecture = _text(metadata, "general.architecture")
    fields = {field: f"{architecture}.{key}" for field, (key, _) in HPARAM_KEYS.items()}
    kinds = KINDS | {fields[field]: kind for field, (_, kind) in HPARAM_KEYS.items()}
    for key, kind in kinds.items():
        value = metadata.get(key)
        if value is not None and value.kind is not kind and not _is_per_layer(key, fields, value):
            yield Finding("key-type", f"{value.kind} where {kind} is required", file, f"key '{key}'")
    if layout.tensors and layout.stopped_at is None:
        for key in _required(metadata, architecture, fields):
            if key not in metadata:
                yield Finding("key-missing", "required, but missing", file, f"key '{key}'")
    for what, names in (("key", metadata), ("tensor", (tensor.name for tensor in layout.tensors))):
        for name in names:
            if not name.isprintable():
                reason = "its name has characters that steer a terminal, cannot be seen, or are no UTF-8"
                yield Finding("hostile-name", reason, file, f"{what} {name!r}")


def _required(metadata: Metadata, architecture: str | None, fields: dict[str, str]) -> list[str]:
    """The keys that a file with these must have. Adapters, projectors, importance matrices and later shards of a set
    have their own.
    """
    if metadata.get("split.no", Value(Kind.UINT16, 0)).data:
        return []
    if architecture == "clip" or (_text(metadata, "general.type") or "model") != "model":
        return []
    if architecture is None:
        return ["general.architecture"]
    return [fields[field] for field in (LLAMA_FIELDS if architecture == "llama" else ANY_FIELDS)]


def _text(metadata: Metadata, key: str) -> str | None:
    value = metadata.get(key)
    return str(value.data) if value and value.kind is Kind.STRING else None


def _is_per_layer(key: str, fields: dict[str, str], value: Value) -> bool:
    numbers = (Kind.UINT32, Kind.INT32)
    return value.kind is Kind.ARRAY and value.item in numbers and key in {fields[field] for field in PER_LAYER}
