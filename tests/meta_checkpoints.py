"""Makes Meta checkpoints with torch: any state dict, in any number of shards, cut as LLaMA 1 and 2 or as Llama 3 was.

How each tensor is cut follows from the parallel layers in Meta's code: ColumnParallelLinear splits the rows of what it
stores, RowParallelLinear the columns, ParallelEmbedding (LLaMA 1 and 2) the columns, VocabParallelEmbedding (Llama 3)
the rows. Norms and buffers are copied into every shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from llamatools.checkpoint import Hyperparameters

ROWS: Literal[0] = 0
COLUMNS: Literal[1] = 1
CUTS = {"wq": ROWS, "wk": ROWS, "wv": ROWS, "wo": COLUMNS, "w1": ROWS, "w2": COLUMNS, "w3": ROWS, "output": ROWS}

StateDict = dict[str, torch.Tensor]
Axis = Literal[0, 1]
LLAMA_2: Axis = COLUMNS  # how tok_embeddings is cut
LLAMA_3: Axis = ROWS


def write_meta(
    folder: Path,
    state: Mapping[str, torch.Tensor | np.ndarray[Any, Any]],
    params: Mapping[str, Any],
    tokenizer: bytes | None = None,
    *,
    n_shards: int = 1,
    embedding_axis: Axis = LLAMA_2,
    dtype: torch.dtype | None = None,
    checklist: bool = False,
) -> Path:
    """A checkpoint in `folder`, which is made where it is missing.

    state: by Meta's names. tokenizer: the bytes of tokenizer.model. dtype: of every tensor, None for what it is.
    checklist: adds checklist.chk, the MD5 sums that Meta publishes. Raises ValueError for what does not divide.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: torch.as_tensor(tensor).to(dtype) for name, tensor in state.items()}
    for n in range(n_shards):
        torch.save(shard(whole, n, n_shards, embedding_axis), folder / f"consolidated.{n:02}.pth")
    (folder / "params.json").write_text(json.dumps(params) + "\n")
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer)
    if checklist:
        files = sorted(path for path in folder.iterdir() if path.suffix in (".pth", ".json", ".model"))
        sums = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
        (folder / "checklist.chk").write_text("".join(sums))
    return folder


def shard(state: Mapping[str, torch.Tensor], n: int, n_shards: int, embedding_axis: Axis = LLAMA_2) -> StateDict:
    """The n-th of `n_shards` parts of every tensor, each in a storage of its own that is no larger than itself."""
    return {name: _part(name, tensor, n, n_shards, embedding_axis) for name, tensor in state.items()}


def _part(name: str, tensor: torch.Tensor, n: int, n_shards: int, embedding_axis: Axis) -> torch.Tensor:
    axis = cut_axis(name, embedding_axis)
    if axis is None:
        return tensor.clone()
    if tensor.shape[axis] % n_shards:
        raise ValueError(f"{name}: axis {axis} of {tuple(tensor.shape)} does not divide into {n_shards} shards")
    return tensor.chunk(n_shards, axis)[n].clone(memory_format=torch.contiguous_format)


def cut_axis(name: str, embedding_axis: Axis) -> int | None:
    """The axis along which shards hold parts of a tensor, None where each holds all of it."""
    layer = name.removesuffix(".weight").rpartition(".")[-1]
    return embedding_axis if layer == "tok_embeddings" else CUTS.get(layer)


def join(shards: Sequence[Mapping[str, torch.Tensor]], embedding_axis: Axis = LLAMA_2) -> StateDict:
    """The inverse of `shard`."""
    whole = {}
    for name in shards[0]:
        axis = cut_axis(name, embedding_axis)
        whole[name] = shards[0][name] if axis is None else torch.cat([part[name] for part in shards], axis)
    return whole


def params_of(h: Hyperparameters) -> dict[str, Any]:
    """A params.json under which Meta's code builds this shape; vocab_size is -1, as in Llama 2."""
    formula = int(2 * 4 * h.dim / 3)  # rounded up to multiple_of, after ffn_dim_multiplier
    params = {
        "dim": h.dim,
        "n_layers": h.n_layers,
        "n_heads": h.n_heads,
        "n_kv_heads": h.n_kv_heads,
        "vocab_size": -1,
        "multiple_of": h.hidden_dim,
        "ffn_dim_multiplier": h.hidden_dim / formula,
        "norm_eps": h.norm_eps,
        "rope_theta": h.rope_theta,
    }
    return params if h.head_dim * h.n_heads == h.dim else params | {"head_dim": h.head_dim}


def rope_freqs(h: Hyperparameters) -> torch.Tensor:
    """The buffer `rope.freqs` of a Llama 2 checkpoint: (head_dim / 2,) float32, what a position is multiplied by."""
    return h.rope_theta ** -(torch.arange(0, h.head_dim, 2).float() / h.head_dim)


def tied(state: Mapping[str, torch.Tensor], *, stored: bool = True) -> StateDict:
    """The model that also reads with its embedding. stored: with a second copy of it, as in Meta's Llama 3.2 files."""
    rest = {name: tensor for name, tensor in state.items() if name != "output.weight"}
    return rest | {"output.weight": state["tok_embeddings.weight"].clone()} if stored else rest


def read_one_shard(folder: Path) -> tuple[StateDict, dict[str, Any], bytes]:
    """The state dict, params.json and tokenizer.model of a checkpoint in one shard, as arguments of `write_meta`."""
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    return state, json.loads((folder / "params.json").read_text()), (folder / "tokenizer.model").read_bytes()
