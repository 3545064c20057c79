"""GGUF files of a LLaMA of one layer, built field by field, so that any key and any tensor can be wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf_files import F32, I32, STRING, U32, Tensor, array, build, key, scalar

N_TOKENS = 40
KEYS: Mapping[str, bytes] = {
    "general.architecture": scalar(STRING, "llama"),
    "llama.context_length": scalar(U32, 64),
    "llama.embedding_length": scalar(U32, 32),
    "llama.block_count": scalar(U32, 1),
    "llama.feed_forward_length": scalar(U32, 64),
    "llama.attention.head_count": scalar(U32, 4),
    "llama.attention.head_count_kv": scalar(U32, 2),
    "llama.attention.layer_norm_rms_epsilon": scalar(F32, 1e-5),
    "tokenizer.ggml.model": scalar(STRING, "llama"),
    "tokenizer.ggml.tokens": array(STRING, [f"token {n}" for n in range(N_TOKENS)]),
    "tokenizer.ggml.scores": array(F32, [0.0] * N_TOKENS),
    "tokenizer.ggml.token_type": array(I32, [1] * N_TOKENS),
}
# Shapes with the fastest axis first.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "token_embd.weight": (32, N_TOKENS),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (32, 16),
    "blk.0.attn_v.weight": (32, 16),
    "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.ffn_gate.weight": (32, 64),
    "blk.0.ffn_up.weight": (32, 64),
    "blk.0.ffn_down.weight": (64, 32),
    "output_norm.weight": (32,),
}


def llama(
    keys: Mapping[str, bytes | None] | None = None,
    tensors: Mapping[str, Tensor | None] | None = None,
    *,
    more_keys: Sequence[bytes] = (),
    more_tensors: Sequence[Tensor] = (),
    **build_options: Any,
) -> bytes:
    """The file. keys, tensors: replace those of these names, or leave them out (None); more of both follow."""
    all_keys = {**KEYS, **(keys or {})}
    all_tensors = {**{name: Tensor(name, ne=ne) for name, ne in SHAPES.items()}, **(tensors or {})}
    return build(
        [*(key(name, value) for name, value in all_keys.items() if value is not None), *more_keys],
        [*(tensor for tensor in all_tensors.values() if tensor is not None), *more_tensors],
        **build_options,
    )


def data_start(file_options: Mapping[str, Any] | None = None) -> int:
    """Where the tensors' data begin in `llama(**file_options)`."""
    return len(llama(**(file_options or {}), data=False))


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
