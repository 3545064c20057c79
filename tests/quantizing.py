"""Models that tests quantize, and what they ask of the files."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_llamas import Weights, write_gguf

from llamatools.checkpoint import Hyperparameters

TINY_LLAMA = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
WIDE = Hyperparameters(  # rows of 256, which every block type divides, but for ffn_down
    dim=256, hidden_dim=288, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64,
    vocab_size=300, norm_eps=1e-5, rope_theta=10000.0, max_seq_len=64,
)  # fmt: skip
BF = gguf.GGMLQuantizationType.BF16


def write_wide(path: Path, weights: Weights, **extra: Any) -> Path:
    return write_gguf(path, weights, WIDE, matrices=BF, **extra)


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def floats(tensor: gguf.ReaderTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


def columns_of(path: Path) -> dict[str, int]:
    """The matrices that llama-imatrix measures, each with the length of its rows."""
    return {
        tensor.name: int(tensor.shape[0])
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    }


def digest(path: Path) -> str:
    """SHA-256 of all tensors' names, dtypes and bytes, in the order of their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors_of(path).items()):
        total.update(f"{name} {tensor.tensor_type.name} ".encode() + tensor.data.tobytes())
    return total.hexdigest()


def damaged(source: Path, path: Path, name: str) -> Path:
    """A copy in which a bit of the tensor's first byte is another."""
    data = bytearray(source.read_bytes())
    data[tensors_of(source)[name].data_offset] ^= 1
    path.write_bytes(data)
    return path


def run(*arguments: object, **how: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llamatools", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **how)
