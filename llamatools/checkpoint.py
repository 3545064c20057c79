"""What a model is, whatever files it came in: tensors, hyperparameters, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .metadata import Metadata
from .tensors import LazyTensor, SourceFile

Scheme = Literal["meta", "gguf", "hf"]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of rotary embedding (llama-models, models/llama3/model.py, apply_scaling).

    Angles of a wavelength above old_context / low_freq_factor tokens are divided by `factor`, those below
    old_context / high_freq_factor are kept, those between are blended.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    old_context: int = 8192


@dataclass(frozen=True)
class Hyperparameters:
    """A LLaMA's shape, in Meta's names. head_dim is the width of one head; max_seq_len the context in tokens."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_seq_len: int
    rope_scaling: RopeScaling | None = None


# Token types, numbered as in SentencePiece and GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and how text is cut into it.

    model: "llama" (SentencePiece BPE with byte fallback) or "gpt2" (byte-level BPE).
    pre: the pre-tokenizer's name in llama.cpp ("default", "llama-bpe", "smollm").
    tokens: the text of each id; for "gpt2" in GPT-2's printable spelling of bytes. Not UTF-8: surrogates.
    scores: (vocab_size,) float32, for "llama" only. types: (vocab_size,) int32, see NORMAL and its neighbours.
    merges: for "gpt2" only, "left right" in order of priority.
    special: GGUF's name of a role -> id: bos, eos, unknown, padding, eot, eom, fim_pre, fim_suf, fim_mid.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    scores: NDArray[np.float32] | None
    types: NDArray[np.int32]
    merges: Sequence[str] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = True
    add_eos: bool = False
    add_space_prefix: bool = True
    chat_template: str | None = None


@dataclass(frozen=True)
class Note:
    """Something that the files do not say: what was chosen, why, and (in `option`) how to choose otherwise."""

    what: str
    value: str
    reason: str
    option: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, understood.

    path: as it was named. scheme: whose tensor names and q/k row order these are; "meta" and "gguf" share the order.
    tensors: by name, in the order of execution where that is known. files: every file that tensors come from.
    metadata: what else the files say. notes: what they do not say and was derived.
    dropped: names of tensors that were left out, with the reason.
    """

    path: Path
    scheme: Scheme
    tensors: Mapping[str, LazyTensor]
    files: tuple[SourceFile, ...]
    hparams: Hyperparameters | None = None
    tokenizer: Tokenizer | None = None
    metadata: Metadata = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
