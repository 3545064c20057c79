"""Where a file's tensors came from, and their digests: the `llamatools.*` metadata keys.

They are arrays of equal length, one item a tensor (or file), so that a reader needs no parser. Paths and times are left
out: the same input gives the same bytes. Digests are SHA-256 of a tensor's bytes without padding. They stay in the
file when another tool rewrites it; one whose dtype no longer is the tensor's is stale, not wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoint import Checkpoint
from .layout import PlacedTensor
from .metadata import Kind, Metadata, Value, array, strings
from .tensors import FileTensor

PREFIX = "llamatools."
VERSION = "llamatools.version"
UNKNOWN = "0" * 64  # stands where a digest will be, so that the header's size is known before the data

TENSOR_NAMES, TENSOR_DTYPES = "llamatools.tensor.names", "llamatools.tensor.dtypes"
TENSOR_SHAPES, TENSOR_SHA256 = "llamatools.tensor.shapes", "llamatools.tensor.sha256"
SOURCE_FILES, SOURCE_SIZES = "llamatools.source.files", "llamatools.source.sizes"
SOURCE_TENSORS, SOURCE_SHA256 = "llamatools.source.tensors", "llamatools.source.sha256"
SOURCE_DROPPED = "llamatools.source.dropped"

Digests = Mapping[str, str]  # hexadecimal SHA-256 by name


def tensor_keys(tensors: Sequence[PlacedTensor], digests: Digests) -> dict[str, Value]:
    """What was written: name, dtype, shape and digest of each tensor."""
    return {
        TENSOR_NAMES: strings([t.name for t in tensors]),
        TENSOR_DTYPES: strings([t.dtype.name for t in tensors]),
        TENSOR_SHAPES: strings([spelled(t.shape) for t in tensors]),
        TENSOR_SHA256: strings([digests.get(t.name, UNKNOWN) for t in tensors]),
    }


def source_keys(checkpoint: Checkpoint, sources: Iterable[FileTensor], digests: Digests) -> dict[str, Value]:
    """What it was made from: files with their sizes, tensors with their digests, tensors left out and why."""
    names = [source_name(tensor) for tensor in sources]
    keys = {
        **file_keys((file.path, file.size) for file in checkpoint.files),
        SOURCE_TENSORS: strings(names),
        SOURCE_SHA256: strings([digests.get(name, UNKNOWN) for name in names]),
    }
    if checkpoint.dropped:
        keys[SOURCE_DROPPED] = strings([f"{name}: {reason}" for name, reason in checkpoint.dropped.items()])
    return keys


def file_keys(files: Iterable[tuple[Path, int]]) -> dict[str, Value]:
    """The files it was made from, by name, with their sizes."""
    files = list(files)
    return {
        SOURCE_FILES: strings([path.name for path, _ in files]),
        SOURCE_SIZES: array(Kind.UINT64, np.array([size for _, size in files], np.uint64)),
    }


def source_name(tensor: FileTensor) -> str:
    """How a source tensor is called in the keys: its file's name and its own."""
    return f"{tensor.file.path.name}:{tensor.name}"


def spelled(shape: Sequence[int]) -> str:
    """A shape as text, outermost axis first: 4096x11008."""
    return "x".join(map(str, shape))


@dataclass(frozen=True)
class Recorded:
    """What the keys say of a tensor. Its digest holds for this dtype and shape only."""

    dtype: str
    shape: str
    sha256: str

    def is_stale(self, tensor: PlacedTensor) -> bool:
        """Whether the tensor was changed into another dtype or shape since."""
        return (self.dtype, self.shape) != (tensor.dtype.name, spelled(tensor.shape))


def recorded_digests(metadata: Metadata) -> dict[str, Recorded]:
    """The digests that a file carries, by tensor; empty where it carries none (or the keys were tampered with)."""
    columns = [metadata.get(key) for key in (TENSOR_NAMES, TENSOR_DTYPES, TENSOR_SHAPES, TENSOR_SHA256)]
    lists = [list(column.data) for column in columns if column and column.item is Kind.STRING]
    if len(lists) < 4 or len({len(column) for column in lists}) > 1:
        return {}
    return {name: Recorded(*facts) for name, *facts in zip(*lists, strict=True)}
