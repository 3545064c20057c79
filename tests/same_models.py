"""One model's weights in every format, each written by someone else's library; and files damaged byte by byte."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from meta_checkpoints import StateDict, params_of, rope_freqs
from numpy.typing import NDArray
from safetensors.torch import save_file
from tiny_llamas import TINY, hf_rows, random_weights

from llamatools import MetaOptions, Overrides

OPTIONS = MetaOptions(overrides=Overrides(context=TINY.max_seq_len))
Q, K = "blk.0.attn_q.weight", "blk.1.attn_k.weight"


def state_of(seed: int = 0) -> StateDict:
    state = {name: torch.from_numpy(array) for name, array in random_weights(TINY, seed).items()}
    return state | {"rope.freqs": rope_freqs(TINY)}


def params() -> dict[str, object]:
    return params_of(TINY) | {"max_seq_len": TINY.max_seq_len}


def write_hf(folder: Path, state: StateDict) -> Path:
    """The weights as transformers names them, by gguf-py's map of names, q and k in its order of rows."""
    from transformers import LlamaConfig

    folder.mkdir()
    LlamaConfig(
        hidden_size=TINY.dim, intermediate_size=TINY.hidden_dim, num_hidden_layers=TINY.n_layers,
        num_attention_heads=TINY.n_heads, num_key_value_heads=TINY.n_kv_heads, vocab_size=TINY.vocab_size,
        max_position_embeddings=TINY.max_seq_len, rms_norm_eps=TINY.norm_eps, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    map_of = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, TINY.n_layers)
    ours = {map_of.get_name(name.removesuffix(".weight")): t for name, t in state.items() if name != "rope.freqs"}
    theirs = ["model.embed_tokens", "model.norm", "lm_head"]
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    theirs += [f"model.layers.{n}.{part}" for n in range(TINY.n_layers) for part in parts]
    tensors = {}
    for stem in theirs:
        tensor = ours[map_of.get_name(stem)]
        n_heads = {"q_proj": TINY.n_heads, "k_proj": TINY.n_kv_heads}.get(stem.rpartition(".")[2])
        rows = hf_rows(n_heads, TINY.head_dim) if n_heads else slice(None)
        tensors[f"{stem}.weight"] = tensor[rows].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def data_of(path: Path) -> dict[str, NDArray[np.uint8]]:
    """The bytes of each tensor, (rows, bytes per row), by gguf-py; written to, they change the file."""
    tensors = gguf.GGUFReader(path, "r+").tensors
    return {
        t.name: t.data.view(np.uint8).reshape(-1, t.n_bytes // max(1, t.n_elements // int(t.shape[0]))) for t in tensors
    }


def exchange(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> None:
    kept = a.copy()
    a[:] = b
    b[:] = kept
