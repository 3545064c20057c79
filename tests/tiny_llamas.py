"""Small LLaMAs for tests: their weights under Meta's names, as a Checkpoint, and as a GGUF written by gguf-py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llamatools import names
from llamatools.checkpoint import Checkpoint, Hyperparameters, RopeScaling
from llamatools.dtypes import F32, DType, Floats
from llamatools.tensors import ArrayTensor

SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "data" / "stories260k"
needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="needs ../shared/data/stories260k")

Weights = Mapping[str, Floats]  # by Meta's names

TINY = Hyperparameters(
    dim=64, hidden_dim=96, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=8,
    vocab_size=300, norm_eps=1e-5, rope_theta=10000.0, max_seq_len=128,
)  # fmt: skip


def random_weights(h: Hyperparameters, seed: int = 0) -> dict[str, Floats]:
    """Weights under which hidden states neither grow nor vanish."""
    draws = np.random.default_rng(seed)
    weights = {}
    for name, shape in names.shapes(h).items():
        spread = 0.1 if len(shape) == 1 or name == names.EMBEDDING else shape[-1] ** -0.5
        center = 1.0 if len(shape) == 1 else 0.0
        weights[name] = (center + spread * draws.standard_normal(shape)).astype(np.float32)
    return weights


def stories() -> tuple[dict[str, Floats], Hyperparameters]:
    """stories260K, read by torch."""
    import torch

    state = torch.load(STORIES / "consolidated.00.pth", weights_only=True)
    h = Hyperparameters(
        dim=64, hidden_dim=172, n_layers=5, n_heads=8, n_kv_heads=4, head_dim=8,
        vocab_size=512, norm_eps=1e-5, rope_theta=10000.0, max_seq_len=512,
    )  # fmt: skip
    return {name: state[name].numpy() for name in names.meta_names(h.n_layers) if name in state}, h


def checkpoint_of(
    weights: Weights, h: Hyperparameters, dtype: DType = F32, path: Path = Path("original")
) -> Checkpoint:
    """The weights as a Meta checkpoint in memory, stored as `dtype`."""
    assert dtype.encode is not None
    tensors = {
        name: ArrayTensor(name, dtype, dtype.encode(array.reshape(-1, array.shape[-1]), None).reshape(array.shape))
        for name, array in weights.items()
    }
    return Checkpoint(path, "meta", tensors, (), h)


def rope_divisors(h: Hyperparameters, scaling: RopeScaling) -> Floats:
    """Llama 3.1's, as gguf-py's conversion computes them (conversion/llama.py, generate_extra_tensors)."""
    divisors = []
    for j in range(h.head_dim // 2):
        wavelength = 2 * math.pi * h.rope_theta ** (2 * j / h.head_dim)
        if wavelength < scaling.old_context / scaling.high_freq_factor:
            divisors.append(1.0)
        elif wavelength > scaling.old_context / scaling.low_freq_factor:
            divisors.append(scaling.factor)
        else:
            smooth = (scaling.old_context / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(divisors, np.float32)


ADD = {
    bool: gguf.GGUFWriter.add_bool,
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
    str: gguf.GGUFWriter.add_string,
    list: gguf.GGUFWriter.add_array,
}


def write_gguf(
    path: Path,
    weights: Weights,
    h: Hyperparameters,
    *,
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    tokenizer: Path | None = None,
    architecture: str = "llama",
    extra: Mapping[str, Any] | None = None,
    more_tensors: Mapping[str, Floats] | None = None,
) -> Path:
    """A GGUF of these weights by gguf-py. extra: more keys, by type. more_tensors: under GGUF's names, as F32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(h.max_seq_len)
    writer.add_embedding_length(h.dim)
    writer.add_block_count(h.n_layers)
    writer.add_feed_forward_length(h.hidden_dim)
    writer.add_head_count(h.n_heads)
    writer.add_head_count_kv(h.n_kv_heads)
    writer.add_layer_norm_rms_eps(h.norm_eps)
    writer.add_rope_freq_base(h.rope_theta)
    writer.add_rope_dimension_count(h.head_dim)
    writer.add_vocab_size(h.vocab_size)
    for key, value in (extra or {}).items():
        ADD[type(value)](writer, key, value)
    if tokenizer is not None:
        add_sentencepiece(writer, tokenizer)
    for name, array in weights.items():
        kind = matrices if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(names.meta_to_gguf(name), data, raw_dtype=kind)
    for name, array in (more_tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_sentencepiece(writer: gguf.GGUFWriter, path: Path) -> None:
    """The vocabulary of a tokenizer.model, read by the sentencepiece library."""
    from sentencepiece import SentencePieceProcessor

    sp = SentencePieceProcessor(model_file=str(path))
    ids = range(sp.get_piece_size())
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([sp.id_to_piece(i) for i in ids])
    writer.add_token_scores([sp.get_score(i) for i in ids])
    writer.add_token_types(
        [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in ids]
    )
    writer.add_bos_token_id(sp.bos_id())
    writer.add_eos_token_id(sp.eos_id())
    writer.add_unk_token_id(sp.unk_id())


def hf_rows(n_heads: int, head_dim: int) -> np.ndarray:
    """Which rows of Meta's wq or wk make those of Hugging Face, where a pair is half a head apart."""
    within = np.r_[0:head_dim:2, 1:head_dim:2]
    return (np.arange(n_heads)[:, None] * head_dim + within).ravel()
