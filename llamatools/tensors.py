"""Lazy tensors: read by ranges of rows, from files or computed from other lazy tensors.

A tensor's *rows* are its last axis: shape (a, b, n) has a * b rows of n weights, a 1-D tensor is one row. Tensors are
read by ranges of rows, as blocks of their dtype, so that no tensor need exist in memory whole.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .dtypes import BF16, Blocks, DType, Encode, Floats, Weights
from .errors import FormatError, UnsupportedError, in_file
from .strided import StridedRows


class Witness:
    """Is told of the data as a read passes them on, so that digests and losses need no second read.

    This one ignores what it is told. Reads in increasing order of rows tell in increasing order of rows.
    """

    def read(self, tensor: FileTensor, blocks: Blocks) -> None:
        """`blocks` (rows, blocks per row) came from the file of `tensor`."""

    def encoded(self, weights: Weights, blocks: Blocks, dtype: DType, start: int) -> None:
        """`weights` (rows, weights per row), of which the first is row `start`, became `blocks` of `dtype`."""


NO_WITNESS = Witness()


class LazyTensor(ABC):
    """A tensor that is read by ranges of rows.

    name: in the scheme of its checkpoint. shape: outermost axis first. parts: the tensors it is computed from.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    parts: tuple[LazyTensor, ...] = ()

    @abstractmethod
    def read(self, start: int, stop: int, witness: Witness = NO_WITNESS) -> Blocks:
        """Rows start to stop as a C-contiguous array (rows, blocks per row) of dtype.block.

        Raises FormatError when the file no longer holds them.
        """

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def row_length(self) -> int:
        """Weights per row."""
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_nbytes(self) -> int:
        return self.dtype.row_nbytes(self.row_length)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor when its rows are stored one after the other."""
        return self.n_rows * self.row_nbytes

    def leaves(self) -> tuple[LazyTensor, ...]:
        """The tensors without parts that this one is computed from, in order."""
        return tuple(leaf for part in self.parts for leaf in part.leaves()) if self.parts else (self,)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.dtype} {list(self.shape)}>"


class SourceFile:
    """A file that tensors are read from, by `pread`, so that one that shrinks is an error and not a dead process.

    Opened at the first read and kept open; safe for threads. size: bytes, when it was looked at.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._fd: int | None = None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with the bytes from `offset` on. Raises FormatError if the file ends before that."""
        with in_file(self.path):
            if self._fd is None:
                fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                if self._fd is None:
                    self._fd = fd
                else:  # another thread was faster
                    os.close(fd)
            wanted = len(buffer)
            done = 0
            while done < wanted:
                n = os.preadv(self._fd, [buffer[done:]], offset + done)
                if n == 0:
                    raise FormatError(
                        f"bytes {offset} to {offset + wanted} were asked for, but the file now ends at {offset + done}",
                        todo="It changed while it was read",
                    )
                done += n

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __del__(self) -> None:
        self.close()


@dataclass(repr=False, eq=False)
class FileTensor(LazyTensor):
    """A tensor whose bytes lie in a file.

    offset: bytes from the file's start to its first block.
    strides: per axis, in weights; None where the rows lie one after the other. Only unquantized dtypes may have them.
    Whoever makes one has checked that every byte it can touch is inside the file.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: SourceFile
    offset: int
    strides: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.strides is not None and _is_contiguous(self.shape, self.strides):
            self.strides = None
        self._strided = self.strides and StridedRows(
            self.file.read_into, self.dtype.block, self.offset, self.shape, self.strides
        )

    def read(self, start: int, stop: int, witness: Witness = NO_WITNESS) -> Blocks:
        blocks = self._strided.read(start, stop) if self._strided else self._read_contiguous(start, stop)
        witness.read(self, blocks)
        return blocks

    def _read_contiguous(self, start: int, stop: int) -> Blocks:
        blocks = np.empty((stop - start, self.row_length // self.dtype.block_size), self.dtype.block)
        if blocks.nbytes:
            self.file.read_into(blocks.reshape(-1).view(np.uint8).data, self.offset + start * self.row_nbytes)
        return blocks


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether rows lie one after the other. Along an axis of length 1 any stride will do."""
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n > 1 and stride != expected:
            return not all(shape)
        expected *= n
    return True


@dataclass(repr=False, eq=False)
class ArrayTensor(LazyTensor):
    """A tensor that is computed and small, such as the divisors of scaled rotary embedding."""

    name: str
    dtype: DType
    array: NDArray[Any]

    def __post_init__(self) -> None:
        self.shape = self.array.shape

    def read(self, start: int, stop: int, witness: Witness = NO_WITNESS) -> Blocks:
        rows: Blocks = np.ascontiguousarray(self.array.reshape(self.n_rows, self.row_length)[start:stop])
        return rows.astype(self.dtype.block, copy=False)


class Concat(LazyTensor):
    """Tensors joined along an axis: 0 (rows after rows) or -1 (each row is the parts' rows side by side)."""

    def __init__(self, name: str, parts: Sequence[LazyTensor], axis: Literal[0, -1]) -> None:
        first = parts[0]
        joined = list(first.shape)
        joined[axis] = sum(part.shape[axis] for part in parts)
        for part in parts[1:]:
            others = [list(t.shape) for t in (first, part)]
            for shape in others:
                del shape[axis]
            if others[0] != others[1] or part.dtype is not first.dtype:
                raise FormatError(
                    f"one shard has {first.dtype} {list(first.shape)}, another {part.dtype} {list(part.shape)}, "
                    "which cannot be joined",
                    where=f"tensor {name!r}",
                )
        self.name, self.dtype, self.shape, self.parts, self.axis = name, first.dtype, tuple(joined), tuple(parts), axis

    def read(self, start: int, stop: int, witness: Witness = NO_WITNESS) -> Blocks:
        if self.axis == -1 and len(self.shape) > 1:
            return np.concatenate([part.read(start, stop, witness) for part in self.parts], axis=1)
        if len(self.shape) == 1:
            return np.concatenate([part.read(0, 1, witness) for part in self.parts], axis=1)[start:stop]
        pieces = []
        for part in self.parts:
            low, high = max(start, 0), min(stop, part.n_rows)
            if low < high:
                pieces.append(part.read(low, high, witness))
            start, stop = start - part.n_rows, stop - part.n_rows
        if not pieces:
            return self.parts[0].read(0, 0, witness)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=0)


class Replicated(LazyTensor):
    """A tensor that every shard holds a copy of. Reading raises FormatError where the copies differ."""

    def __init__(self, name: str, parts: Sequence[LazyTensor]) -> None:
        first = parts[0]
        for part in parts[1:]:
            if part.shape != first.shape or part.dtype is not first.dtype:
                raise FormatError(
                    f"every shard must hold the same, but one has {first.dtype} {list(first.shape)} and another "
                    f"{part.dtype} {list(part.shape)}",
                    where=f"tensor {name!r}",
                )
        self.name, self.dtype, self.shape, self.parts = name, first.dtype, first.shape, tuple(parts)

    def read(self, start: int, stop: int, witness: Witness = NO_WITNESS) -> Blocks:
        blocks = self.parts[0].read(start, stop, witness)
        for shard, part in enumerate(self.parts[1:], 1):
            other = part.read(start, stop, witness)
            if other.tobytes() != blocks.tobytes():
                differing = int(np.flatnonzero(other.view(np.uint8) != blocks.view(np.uint8))[0])
                raise FormatError(
                    f"shards 0 and {shard} must hold the same, but differ from byte {differing} of row {start} on",
                    where=f"tensor {self.name!r}",
                    todo="The shards are damaged or of different models",
                )
        return blocks


class Cast(LazyTensor):
    """A tensor in another dtype: decoded to float32 and encoded again. Quantizing takes BF16 as it is.

    importance: of each column (row_length,) or, where the rows are several experts', of each column for each expert
    (experts * row_length,), for encoders that weigh errors; None weighs all alike.
    encode: instead of the dtype's own.
    Raises UnsupportedError when the one dtype cannot be decoded or the other not encoded.
    """

    def __init__(
        self, tensor: LazyTensor, dtype: DType, importance: Floats | None = None, encode: Encode | None = None
    ) -> None:
        where = f"tensor {tensor.name!r}"
        encode = encode or dtype.encode
        if tensor.dtype.decode is None:
            raise UnsupportedError(f"{tensor.dtype} weights cannot be converted to {dtype}", where=where)
        if encode is None:
            raise UnsupportedError(f"nothing can be converted to {dtype} here", where=where)
        self.name, self.dtype, self.shape, self.parts = tensor.name, dtype, tensor.shape, (tensor,)
        self._decode = None if tensor.dtype is BF16 and dtype.is_quantized else tensor.dtype.decode
        self._encode = encode
        self.importance = None if importance is None else importance.reshape(-1, self.row_length)  # (experts, columns)

    def read(self, start: int, stop: int, witness: Witness = NO_WITNESS) -> Blocks:
        weights = self.parts[0].read(start, stop, witness)
        if self._decode is not None:
            weights = self._decode(weights)
        blocks = self._encode_rows(weights, start)
        witness.encoded(weights, blocks, self.dtype, start)
        return blocks

    def _encode_rows(self, weights: Weights, start: int) -> Blocks:
        if self.importance is None or len(self.importance) == 1:
            return self._encode(weights, None if self.importance is None else self.importance[0])
        rows_each = self.n_rows // len(self.importance)
        stop = start + len(weights)
        experts = range(start // rows_each, -(-stop // rows_each))
        bounds = [(max(n * rows_each, start) - start, min((n + 1) * rows_each, stop) - start) for n in experts]
        pieces = [
            self._encode(weights[low:high], self.importance[n]) for n, (low, high) in zip(experts, bounds, strict=True)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def read_floats(tensor: LazyTensor, start: int = 0, stop: int | None = None) -> Floats:
    """Rows start to stop (all of them by default) as float32 (rows, weights per row).

    Raises UnsupportedError where the dtype cannot be decoded.
    """
    if tensor.dtype.decode is None:
        raise UnsupportedError(f"{tensor.dtype} weights cannot be decoded", where=f"tensor {tensor.name!r}")
    return tensor.dtype.decode(tensor.read(start, tensor.n_rows if stop is None else stop))
