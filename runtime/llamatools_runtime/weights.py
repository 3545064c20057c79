"""Weights used in place: matrices that are views of a mapped model file.

Nothing is loaded. The operating system brings a page of the file into memory when it is first touched, shares it
between all processes that map the file, and may drop it again at any time, since the file still has it. So a matrix
must be multiplied as it is stored: decoded, if it must be, a few rows at a time into a small buffer.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamatools.dtypes import Blocks, DType, Floats
from llamatools.errors import FormatError, UnsupportedError, in_file
from llamatools.layout import Layout, PlacedTensor

from . import guard
from .kernels.products import Rows, has_kernel, products
from .kernels.recorded import cannot_record

Ids = NDArray[np.int64]  # (n_tokens,)

SCRATCH = 1 << 20  # bytes of float32 that decoded rows may take at a time: what fits a core's cache


@dataclass(frozen=True, eq=False)
class Matrix:
    """A tensor on the mapping. A vector is a matrix of one row.

    shape: (n_out, n_in), or (n_in,). blocks: (n_out, blocks per row) of dtype.block, read-only. float32: what it is
    multiplied with is never rounded to eight bits.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    blocks: Blocks
    float32: bool = False

    def rows(self, start: int, stop: int) -> Floats:
        """Rows start to stop as float32 (stop - start, n_in)."""
        return _decode(self.dtype, self.blocks[start:stop])

    def pick(self, ids: Ids) -> Floats:
        """The rows of these ids as float32 (n_ids, n_in)."""
        return _decode(self.dtype, self.blocks[ids])

    @cached_property
    def in_place(self) -> Rows:
        """What there is to multiply by, without decoding anything; only of a dtype that has a kernel for it."""
        return Rows(self.dtype, self.blocks)

    def vector(self) -> Floats:
        """All of a vector as float32 (n_in,)."""
        return np.ravel(self.rows(0, 1))


def matmul(matrix: Matrix, x: Floats, *, float32: bool = False) -> Floats:
    """x times the matrix's transpose: (n_tokens, n_in) -> (n_tokens, n_out), see `matmuls`."""
    return matmuls([matrix], x, float32=float32)[0]


def matmuls(matrices: Sequence[Matrix], x: Floats, *, float32: bool = False) -> list[Floats]:
    """x times each matrix's transpose: (n_tokens, n_in) -> (n_tokens, n_out) each.

    Quantized rows are multiplied by x in eight bits (see docs/kernels.md), in whole numbers but for the scales; x is
    quantized once for all matrices. Where a dtype has no such kernel, and where float32 is set, here or in a matrix,
    rows are decoded instead and x is left as it is.
    """
    n_tokens = len(x)
    in_place = [
        has_kernel(matrix.dtype, n_tokens) and not ((float32 or matrix.float32) and matrix.dtype.is_quantized)
        for matrix in matrices
    ]
    if all(in_place):
        return products([matrix.in_place for matrix in matrices], x)
    chosen = [matrix.in_place for matrix, is_in_place in zip(matrices, in_place, strict=True) if is_in_place]
    results = iter(products(chosen, x) if chosen else [])
    return [
        next(results) if is_in_place else _decoded_matmul(matrix, x)
        for matrix, is_in_place in zip(matrices, in_place, strict=True)
    ]


def _decoded_matmul(matrix: Matrix, x: Floats) -> Floats:
    """The product in float32.

    An F32 matrix is multiplied straight from the mapping; rows of any other dtype are decoded, a bounded number at a
    time, and used for all tokens while they are in the cache.
    """
    cannot_record()
    n_out, n_in = matrix.shape
    if matrix.dtype.name == "F32" and matrix.blocks.flags.aligned:
        product: Floats = x @ matrix.blocks.T
        return product
    y = np.empty((len(x), n_out), np.float32)
    n_rows = max(1, SCRATCH // (4 * n_in))
    for start in range(0, n_out, n_rows):
        rows = matrix.rows(start, min(start + n_rows, n_out))  # (n_rows, n_in)
        np.matmul(x, rows.T, out=y[:, start : start + n_rows])
    return y


def map_weights(layout: Layout, *, float32: bool = False) -> dict[str, Matrix]:
    """Maps the layout's files and gives its tensors by name, as views of the mappings.

    A file must not change while a tensor of it is in use (guard.py). Raises FormatError when it is not what the layout
    describes any more, and UnsupportedError for a dtype that has no decoder.
    """
    views: dict[str, Matrix] = {}
    for n, file in enumerate(layout.files):
        with in_file(file.path):
            tensors = [tensor for tensor in layout.tensors if tensor.file == n]
            for tensor in tensors:
                if tensor.dtype.decode is None:
                    raise UnsupportedError(
                        f"weights of type {tensor.dtype} cannot be computed with", where=f"tensor {tensor.name!r}"
                    )
                if tensor.end > file.size:
                    raise FormatError(
                        f"its data is bytes {tensor.offset} to {tensor.end}, but the file ends at {file.size}",
                        where=f"tensor {tensor.name!r}",
                        todo="The file is probably truncated",
                    )
            mapping = _map(file.path, file.size)
            views |= {tensor.name: _view(mapping, tensor, float32) for tensor in tensors}
    return views


def _map(path: Path, size: int) -> mmap.mmap:
    with open(path, "rb") as opened:
        now = os.fstat(opened.fileno()).st_size
        if now != size:
            raise FormatError(
                f"it had {size} bytes when its header was read and has {now} now", todo="It changed while it was opened"
            )
        mapping = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ)
        guard.watch(mapping, path, opened.fileno())
        return mapping


def _view(mapping: mmap.mmap, tensor: PlacedTensor, float32: bool) -> Matrix:
    n_blocks = tensor.nbytes // tensor.dtype.block_nbytes
    blocks_per_row = tensor.shape[-1] // tensor.dtype.block_size if tensor.shape else 1
    blocks = np.frombuffer(mapping, tensor.dtype.block, n_blocks, tensor.offset)  # (n_blocks,)
    return Matrix(tensor.name, tensor.dtype, tensor.shape, blocks.reshape(-1, blocks_per_row), float32)


def _decode(dtype: DType, blocks: Blocks) -> Floats:
    assert dtype.decode is not None, "map_weights lets no other dtype pass"
    return dtype.decode(blocks)
