"""Any model's tensors in one scheme, so that two can be compared: GGUF's names, Meta's order of rows, shards joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from .. import names
from ..checkpoint import Checkpoint
from ..dtypes import F32, Blocks
from ..plan import rope_divisors
from ..tensors import NO_WITNESS, ArrayTensor, LazyTensor, Witness

COMPARED = 1 << 20  # bytes compared or hashed at once


class HeadRows(LazyTensor):
    """A q or k matrix with the rows of each head in another order.

    A rotary pair is two neighbouring rows in Meta's order; in Hugging Face's its second row is half a head after its
    first. to_meta: from the one to the other or back. head_dim: rows per head.
    """

    def __init__(self, tensor: LazyTensor, head_dim: int, *, to_meta: bool) -> None:
        self.name, self.dtype, self.shape, self.parts = tensor.name, tensor.dtype, tensor.shape, (tensor,)
        halves = np.r_[0:head_dim:2, 1:head_dim:2]  # row i of Hugging Face's head is row halves[i] of Meta's
        self._head_dim, self._order = head_dim, np.argsort(halves) if to_meta else halves

    def read(self, start: int, stop: int, witness: Witness = NO_WITNESS) -> Blocks:
        first, end = start // self._head_dim, -(-stop // self._head_dim)  # heads
        heads = self.parts[0].read(first * self._head_dim, end * self._head_dim, witness)
        rows: Blocks = heads.reshape(end - first, self._head_dim, -1)[:, self._order].reshape(heads.shape)
        skipped = first * self._head_dim
        return np.ascontiguousarray(rows[start - skipped : stop - skipped])


@dataclass(frozen=True)
class Hub:
    """A model's tensors by GGUF's names, with rows in Meta's order.

    own: what each is called in its files. unordered: q and k of a Hugging Face model whose order could not be undone,
    since no config.json tells the width of a head.
    """

    tensors: Mapping[str, LazyTensor]
    own: Mapping[str, str]
    unordered: tuple[str, ...] = ()


def hub(checkpoint: Checkpoint) -> Hub:
    """The tensors of any checkpoint. One whose name the scheme does not know keeps it."""
    tensors: dict[str, LazyTensor] = {}
    own, unordered = {}, []
    for name, tensor in checkpoint.tensors.items():
        common = _common_name(checkpoint, name)
        if checkpoint.scheme == "hf" and is_rotated(common):
            if checkpoint.hparams is None:
                unordered.append(common)
            else:
                tensor = HeadRows(tensor, checkpoint.hparams.head_dim, to_meta=True)
        tensors[common], own[common] = tensor, name
    return Hub(tensors, own, tuple(unordered))


def with_divisors(checkpoint: Checkpoint, h: Hub) -> Hub:
    """The divisors of scaled RoPE as the tensor that GGUF makes of them."""
    hparams = checkpoint.hparams
    if hparams is None or hparams.rope_scaling is None or names.ROPE_FACTORS in h.tensors:
        return h
    divisors = rope_divisors(hparams.head_dim, hparams.rope_theta, hparams.rope_scaling)
    return replace(h, tensors={**h.tensors, names.ROPE_FACTORS: ArrayTensor(names.ROPE_FACTORS, F32, divisors)})


def is_rotated(name: str) -> bool:
    """Whether a tensor of GGUF's name is a q or k matrix."""
    return name.startswith("blk.") and name.endswith(names.ROTATED)


def _common_name(checkpoint: Checkpoint, name: str) -> str:
    if checkpoint.scheme == "hf":
        return names.hf_to_gguf(name) or name
    if checkpoint.scheme == "meta":
        try:
            return names.meta_to_gguf(name)
        except (KeyError, ValueError):
            return name
    return name


def row_ranges(tensor: LazyTensor) -> list[tuple[int, int]]:
    """All rows, cut into ranges of about COMPARED bytes."""
    step = max(1, COMPARED // max(tensor.row_nbytes, 1))
    return [(start, min(start + step, tensor.n_rows)) for start in range(0, tensor.n_rows, step)]


def same_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    return all(np.array_equal(as_bytes(a.read(*rows)), as_bytes(b.read(*rows))) for rows in row_ranges(a))


def as_bytes(blocks: Blocks) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Blocks (rows, blocks per row) as (rows, bytes per row)."""
    return blocks.view(np.uint8).reshape(len(blocks), -1)
