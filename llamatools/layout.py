"""What a model file looks like, read or still to be written: header facts and an ordered list of placed tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint import Hyperparameters, Note, Tokenizer
from .dtypes import DType
from .errors import LlamatoolsError
from .metadata import Metadata
from .tensors import LazyTensor


@dataclass(frozen=True)
class File:
    """A file of a layout: its path, and its size in bytes."""

    path: Path
    size: int


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor and where its bytes are.

    shape: outermost axis first. offset: bytes from the file's start. nbytes: without padding.
    file: index into the layout's files. strides: in weights, None where rows lie one after the other.
    source: what its rows are read from; None in a layout that is only looked at.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: int = 0
    strides: tuple[int, ...] | None = None
    source: LazyTensor | None = None

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.offset + self.nbytes

    @property
    def alignment(self) -> int:
        """The largest power of two that divides its offset; 0 for offset 0, which every power divides."""
        return self.offset & -self.offset


@dataclass(frozen=True)
class Layout:
    """A model file (or the files of one model) as data.

    format: "GGUF v3", "safetensors", "Meta checkpoint", "torch zip". size: bytes of all files together.
    alignment: what the format promises for every tensor, None where it promises nothing.
    header_end: the byte after the header, before its padding; None where that has no meaning.
    data_offset: where tensor data begin, None where that has no meaning or, in a damaged file, cannot be known (the
    tensors' offsets then count from there).
    tensors: in the order of the file's own list.
    problems: what is wrong with the files, as far as their reader noticed. Only `inspect` gives layouts that have any.
    stopped_at: the byte where reading a damaged header ended; what lies behind it was not understood.
    """

    format: str
    files: tuple[File, ...]
    tensors: tuple[PlacedTensor, ...]
    metadata: Metadata = field(default_factory=dict)
    alignment: int | None = None
    header_end: int | None = None
    data_offset: int | None = None
    hparams: Hyperparameters | None = None
    tokenizer: Tokenizer | None = None
    notes: tuple[Note, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[LlamatoolsError, ...] = ()
    stopped_at: int | None = None

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def n_weights(self) -> int:
        return sum(tensor.n_weights for tensor in self.tensors)

    def sound(self) -> Layout:
        """This layout, if nothing is wrong with it. Raises the first of its problems."""
        for problem in self.problems:
            raise problem
        return self

    def nbytes_by_dtype(self) -> dict[DType, int]:
        """Bytes of weights per dtype, most first."""
        total: Counter[DType] = Counter()
        for tensor in self.tensors:
            total[tensor.dtype] += tensor.nbytes
        return dict(total.most_common())
