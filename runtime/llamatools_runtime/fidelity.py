"""How faithfully a file stores its original's weights, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llamatools.checkpoint import Checkpoint
from llamatools.layout import Layout
from llamatools.names import gguf_to_meta
from llamatools.tensors import LazyTensor, read_floats

from .tolerance import weights_bound
from .weights import Matrix, map_weights

CHUNK = 1 << 20  # weights compared at a time


@dataclass(frozen=True)
class StoredTensor:
    """name: in the file. error: of its weights, relative to their root mean square. bound: what the dtype allows."""

    name: str
    error: float
    bound: float

    @property
    def faithful(self) -> bool:
        return self.error <= self.bound


def stored_tensors(layout: Layout, checkpoint: Checkpoint) -> Iterator[StoredTensor]:
    """Each tensor of the file that the original also has. Reads both once, in constant memory."""
    matrices = map_weights(layout)
    for tensor in layout.tensors:
        original = checkpoint.tensors.get(gguf_to_meta(tensor.name) or "")
        if original is not None:
            error = relative_error(matrices[tensor.name], original)
            yield StoredTensor(tensor.name, error, weights_bound(tensor.dtype, original.dtype))


def relative_error(stored: Matrix, original: LazyTensor) -> float:
    """The root mean square of the differences over that of the original's weights; infinite for another shape."""
    if stored.shape != original.shape:
        return math.inf
    difference = scale = 0.0
    n_rows = max(1, CHUNK // original.row_length)
    for start in range(0, original.n_rows, n_rows):
        stop = min(start + n_rows, original.n_rows)
        expected = read_floats(original, start, stop).astype(np.float64)  # (n_rows, n_in)
        difference += float(np.square(stored.rows(start, stop) - expected).sum())
        scale += float(np.square(expected).sum())
    if difference == 0:
        return 0.0
    return math.sqrt(difference / scale) if scale else math.inf
