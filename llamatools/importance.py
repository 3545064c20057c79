"""The importance of columns that an imatrix lacks, from what it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .dtypes import Floats
from .layout import PlacedTensor
from .names import EMBEDDING, MODEL_TENSORS, NORM, OUTPUT
from .tensors import LazyTensor, read_floats


def of_the_head(importance: Mapping[str, Floats], tensors: Sequence[PlacedTensor]) -> dict[str, Floats]:
    """The importance of the tensor that makes the logits, by name: output.weight, or an embedding that is both.

    llama-imatrix does not record it. But the head reads what the last layer's feed-forward reads, changed by no more
    than that layer's own addition, behind another norm; so the mean squares of the one, divided by the squares of its
    norm's weights and multiplied by those of the other's, are about those of the other. Empty where the imatrix has
    the head itself or not the last layer, or the model is of another kind.
    """
    sources = {tensor.name: tensor.source for tensor in tensors}
    head = MODEL_TENSORS[OUTPUT] if MODEL_TENSORS[OUTPUT] in sources else MODEL_TENSORS[EMBEDDING]
    n_layers = sum(name.endswith(".ffn_norm.weight") for name in sources)
    last = f"blk.{n_layers - 1}."
    read_by_last = importance.get(f"{last}ffn_gate.weight")
    inner, outer = sources.get(f"{last}ffn_norm.weight"), sources.get(MODEL_TENSORS[NORM])
    if head in importance or head not in sources or read_by_last is None or inner is None or outer is None:
        return {}
    inner_squares, outer_squares = _squares(inner), _squares(outer)
    if not inner_squares.shape == outer_squares.shape == read_by_last.shape:
        return {}
    floor = 1e-6 * float(inner_squares.mean())  # where the inner norm lets nothing through, nothing is known
    derived: Floats = (read_by_last / np.maximum(inner_squares, floor) * outer_squares).astype(np.float32)
    return {head: derived}


def _squares(norm: LazyTensor) -> Floats:
    weights: Floats = read_floats(norm)[0]
    return weights * weights
