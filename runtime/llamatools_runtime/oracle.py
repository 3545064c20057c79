"""The oracle: what the original checkpoint computes, by torch, in float32, from Meta's own formulas.

A second implementation of LLaMA that shares nothing with model.py, so that a mistake in one is not a mistake in both:
it takes the checkpoint's tensors under Meta's names, turns by complex numbers, repeats keys and values instead of
grouping queries, and computes the scaled frequencies itself. It follows llama-models' models/llama3/model.py
(precompute_freqs_cis, apply_scaling, apply_rotary_emb, repeat_kv, Attention, FeedForward), but stays in float32
where that code goes through bfloat16.

All tokens go through one layer, then through the next, so only one layer's weights are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from llamatools.checkpoint import Checkpoint, Hyperparameters, RopeScaling
from llamatools.dtypes import Floats
from llamatools.errors import FormatError, UnsupportedError, UsageError
from llamatools.tensors import read_floats

try:
    import torch
    import torch.nn.functional as nn
    from torch import Tensor
except ImportError as error:
    raise UnsupportedError(
        "computing the original takes torch, which is not installed",
        todo="pip install torch --index-url https://download.pytorch.org/whl/cpu",
    ) from error

OUTPUT_ROWS = 4096  # of the output matrix, in memory at a time


class Oracle:
    """The original model. Raises UsageError where the checkpoint is not one that can be computed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.scheme != "meta" or checkpoint.hparams is None:
            raise UsageError(
                "not a Meta checkpoint with its params.json, which the comparison is made against", file=checkpoint.path
            )
        self.path = checkpoint.path
        self.tensors = checkpoint.tensors
        self.hparams: Hyperparameters = checkpoint.hparams

    def hidden_states(self, ids: Sequence[int]) -> Iterator[Floats]:
        """Yields the residual stream (n_tokens, dim) after each layer."""
        h = self.hparams
        freqs_cis = rotations(torch.from_numpy(self.frequencies()), len(ids))  # (n_tokens, head_dim / 2), complex
        x = torch.stack([self._rows("tok_embeddings.weight", i, i + 1)[0] for i in ids])  # (n_tokens, dim)
        for n in range(h.n_layers):
            with torch.inference_mode():
                x = self._layer(n, x, freqs_cis)  # (n_tokens, dim)
            if not x.isfinite().all():
                raise FormatError(
                    "the original itself computes NaN or infinity here", where=f"layer {n}", file=self.path
                )
            yield x.numpy()

    def logits(self, hidden: Floats) -> Floats:
        """The logits (n_tokens, vocab_size) from the last layer's hidden states (n_tokens, dim)."""
        name = "output.weight" if "output.weight" in self.tensors else "tok_embeddings.weight"
        vocab_size = self.tensors[name].shape[0]
        with torch.inference_mode():
            x = self._norm("norm.weight", torch.from_numpy(hidden))  # (n_tokens, dim)
            slices = [
                nn.linear(x, self._rows(name, start, min(start + OUTPUT_ROWS, vocab_size)))
                for start in range(0, vocab_size, OUTPUT_ROWS)
            ]
            return torch.cat(slices, dim=1).numpy()

    def frequencies(self) -> Floats:
        """Radians that each pair of a head is turned by per token, (head_dim / 2,)."""
        h = self.hparams
        freqs = 1.0 / h.rope_theta ** (torch.arange(0, h.head_dim, 2).float() / h.head_dim)
        if h.rope_scaling is not None:
            freqs = torch.tensor([scaled(float(freq), h.rope_scaling) for freq in freqs])
        return freqs.numpy()

    def _layer(self, n: int, x: Tensor, freqs_cis: Tensor) -> Tensor:
        h, layer = self.hparams, f"layers.{n}."
        n_tokens, n_rep = len(x), h.n_heads // h.n_kv_heads

        normed = self._norm(layer + "attention_norm.weight", x)  # (n_tokens, dim)
        xq = self._linear(layer + "attention.wq.weight", normed).view(n_tokens, h.n_heads, h.head_dim)
        xk = self._linear(layer + "attention.wk.weight", normed).view(n_tokens, h.n_kv_heads, h.head_dim)
        xv = self._linear(layer + "attention.wv.weight", normed).view(n_tokens, h.n_kv_heads, h.head_dim)
        xq, xk = apply_rotary(xq, freqs_cis), apply_rotary(xk, freqs_cis)
        xk, xv = (t.repeat_interleave(n_rep, dim=1) for t in (xk, xv))  # (n_tokens, n_heads, head_dim)
        scores = torch.einsum("qhd,khd->hqk", xq, xk) / math.sqrt(h.head_dim)  # (n_heads, n_tokens, n_tokens)
        later = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
        weights = nn.softmax(scores.masked_fill(later, -torch.inf), dim=-1)
        attended = torch.einsum("hqk,khd->qhd", weights, xv).reshape(n_tokens, h.n_heads * h.head_dim)
        x = x + self._linear(layer + "attention.wo.weight", attended)

        normed = self._norm(layer + "ffn_norm.weight", x)  # (n_tokens, dim)
        gate = nn.silu(self._linear(layer + "feed_forward.w1.weight", normed))  # (n_tokens, hidden_dim)
        up = self._linear(layer + "feed_forward.w3.weight", normed)  # (n_tokens, hidden_dim)
        return x + self._linear(layer + "feed_forward.w2.weight", gate * up)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return nn.rms_norm(x, x.shape[-1:], eps=self.hparams.norm_eps) * self._rows(name, 0, 1)[0]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return nn.linear(x, self._rows(name, 0, self.tensors[name].n_rows))

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, (stop - start, n_in) float32."""
        return torch.from_numpy(np.require(read_floats(self.tensors[name], start, stop), np.float32, "W"))


def rotations(freqs: Tensor, n_tokens: int) -> Tensor:
    """For each position and pair a complex number of length one, whose angle is how far the pair is turned there."""
    angles = torch.outer(torch.arange(n_tokens, dtype=torch.float32), freqs)  # (n_tokens, head_dim / 2)
    return torch.polar(torch.ones_like(angles), angles)


def scaled(freq: float, scaling: RopeScaling) -> float:
    """A frequency after Llama 3.1's scaling: slow ones divided by the factor, fast ones kept, a blend between."""
    wavelength = 2 * math.pi / freq
    if wavelength < scaling.old_context / scaling.high_freq_factor:
        return freq
    if wavelength > scaling.old_context / scaling.low_freq_factor:
        return freq / scaling.factor
    smooth = (scaling.old_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * freq / scaling.factor + smooth * freq


def apply_rotary(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Multiplies each pair of neighbours, read as a complex number, by its position's rotation."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))  # (n_tokens, n_heads, head_dim / 2)
    return torch.view_as_real(pairs * freqs_cis[:, None]).flatten(-2)  # (n_tokens, n_heads, head_dim)
