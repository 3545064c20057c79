"""A checkpoint as a model without a file of its own: the GGUF that it would become is planned, and read when needed.

A mapped file is read by the operating system, page by page, as it is computed with. Here a layer's tensors are read
(joined from their shards) when the layer's turn comes, and forgotten after it. So memory holds one layer, the embedding
and the output, and every pass over the model reads the checkpoint once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

from llamatools.checkpoint import Checkpoint
from llamatools.errors import UnsupportedError, in_file
from llamatools.layout import Layout, PlacedTensor
from llamatools.plan import plan_gguf

from .kernels.recorded import cannot_record
from .load import assemble, check, layer_of, load
from .model import Layer, Model
from .weights import Matrix


def model_of_checkpoint(checkpoint: Checkpoint, *, float32: bool = False) -> tuple[Model, Layout]:
    """The model of a GGUF, on its mapping, or of a Meta checkpoint, read as it is needed.

    float32: as of `load`. Raises as `load` and `plan_gguf`, and UnsupportedError for a checkpoint of another kind.
    """
    if checkpoint.scheme == "gguf":
        return load(checkpoint.path, float32=float32)
    with in_file(checkpoint.path):
        if checkpoint.scheme != "meta":
            raise UnsupportedError(
                "neither a GGUF file nor a Meta checkpoint, which are what a model is compared with",
                todo="Convert it first",
            )
        layout = plan_gguf(checkpoint, Path("planned.gguf")).layout
        hparams, _ = check(layout)
        weights = PlannedWeights(layout.tensors, float32)
        layers = PlannedLayers(weights, hparams.n_layers)
        return assemble(hparams, weights, layers, float32=float32), layout


class PlannedWeights(Mapping[str, Matrix]):
    """Tensors by name, each read whole into memory whenever it is asked for."""

    def __init__(self, tensors: Sequence[PlacedTensor], float32: bool = False) -> None:
        self._sources = {tensor.name: tensor.source for tensor in tensors if tensor.source is not None}
        self._float32 = float32

    def __getitem__(self, name: str) -> Matrix:
        cannot_record()
        source = self._sources[name]
        return Matrix(name, source.dtype, source.shape, source.read(0, source.n_rows), self._float32)

    def __contains__(self, name: object) -> bool:
        return name in self._sources  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


class PlannedLayers(Sequence[Layer]):
    """The layers, each read whenever it is asked for."""

    def __init__(self, weights: PlannedWeights, n_layers: int) -> None:
        self._weights, self._n_layers = weights, n_layers

    @overload
    def __getitem__(self, n: int) -> Layer: ...
    @overload
    def __getitem__(self, n: slice) -> tuple[Layer, ...]: ...
    def __getitem__(self, n: int | slice) -> Layer | tuple[Layer, ...]:
        found = range(self._n_layers)[n]
        return layer_of(self._weights, found) if isinstance(found, int) else tuple(self[i] for i in found)

    def __len__(self) -> int:
        return self._n_layers
