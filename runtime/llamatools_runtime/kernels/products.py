"""Products of matrices, as they lie in the file, and activations: what is asked of the team, and in which memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import numpy as np

from llamatools.dtypes import Blocks, DType, Floats
from llamatools.dtypes.compiled import INTEGER

from .job import (
    BLOCKS,
    CODES,
    FIRST_SUMS,
    FUNCTION,
    GRAIN,
    N_FIELDS,
    N_IN,
    N_PADDED,
    N_ROWS,
    N_TOKENS,
    PARTIAL_SUMS,
    SCALES,
    SUMS,
    Y_STRIDE,
    X,
    Y,
)
from .team import Team, kernel, team

# dtype: the module of its kernels, and the columns that share a scale where activations are quantized for it; for those
# that are not, and have a kernel for one token only, 0
KERNELS = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), ("legacy", 32)),
    **dict.fromkeys(("Q4_K", "Q5_K", "Q6_K"), ("k_quants", 256)),
    "IQ4_NL": ("nonlinear", 32),
    "IQ4_XS": ("nonlinear", 256),
    **dict.fromkeys(("F32", "F16", "BF16"), ("plain", 0)),
}
CHUNK = 1 << 17  # bytes of a matrix that a thread takes at a time, when there is one token
TILE = 16  # rows that it takes, when there are many
TOKENS = 8  # that it quantizes at a time
TOGETHER = 4  # tokens that are computed at once, when there are many


class MatrixInPlace(Protocol):
    """shape: (n_out, n_in); blocks: (n_out, blocks per row), contiguous."""

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def blocks(self) -> Blocks: ...


def has_kernel(dtype: DType, n_tokens: int) -> bool:
    """Whether rows of the dtype can be multiplied by so many tokens without decoding them."""
    return dtype.name in KERNELS and (dtype.is_quantized or n_tokens == 1)


def products(matrices: Sequence[MatrixInPlace], x: Floats) -> list[Floats]:
    """x times each matrix's transpose: (n_tokens, n_in) -> (n_tokens, n_out) each, for matrices with a kernel.

    x is quantized once for all matrices of one kind of block, and their rows are divided among the threads together.
    """
    n_tokens = len(x)
    x = np.ascontiguousarray(x, np.float32)
    n_outs = [matrix.shape[0] for matrix in matrices]
    y = np.empty((n_tokens, sum(n_outs)), np.float32)
    ends = np.cumsum(n_outs).tolist()
    results = [y[:, end - n_out : end] for n_out, end in zip(n_outs, ends, strict=True)]
    for columns in {KERNELS[matrix.dtype.name][1] for matrix in matrices}:
        chosen = [pair for pair in zip(matrices, results, strict=True) if KERNELS[pair[0].dtype.name][1] == columns]
        _run(chosen, x, columns, team())
    return results


def _run(pairs: list[tuple[MatrixInPlace, Floats]], x: Floats, columns: int, threads: Team) -> None:
    activations = _Activations(x)
    if columns:
        quantization = _job(f"activations.quantize_by_{columns}", len(x), TOKENS, activations.places)
        threads.run(np.array([quantization], np.int64))
    threads.run(np.array([_product(matrix, y, activations) for matrix, y in pairs], np.int64))


class _Activations:
    """x (n_tokens, n_in) and the memory in which it is quantized; job.py says what lies there."""

    def __init__(self, x: Floats) -> None:
        n_tokens, n_in = x.shape
        n_padded = 1 if n_tokens == 1 else -(-n_tokens // TOGETHER) * TOGETHER
        n_blocks = -(-n_in // 128) * 4
        n = n_blocks * n_padded
        self.x, self.memory = x, np.empty(64 + 32 * n + 3 * 4 * n + 4 * 4 * n_blocks, np.uint8)
        codes = -(-self.memory.ctypes.data // 64) * 64
        after_codes = codes + 32 * n
        self.places = {
            N_IN: n_in, N_TOKENS: n_tokens, N_PADDED: n_padded, X: x.ctypes.data,
            CODES: codes, SCALES: after_codes, SUMS: after_codes + 4 * n, FIRST_SUMS: after_codes + 8 * n,
            PARTIAL_SUMS: after_codes + 12 * n,
        }  # fmt: skip


def _job(function: str, n_rows: int, grain: int, places: dict[int, int]) -> list[int]:
    job = [0] * N_FIELDS
    job[FUNCTION], job[N_ROWS], job[GRAIN] = _entry(function), n_rows, grain
    for field, value in places.items():
        job[field] = value
    return job


def _product(matrix: MatrixInPlace, y: Floats, activations: _Activations) -> list[int]:
    module, _ = KERNELS[matrix.dtype.name]
    n_out, one = matrix.shape[0], len(activations.x) == 1
    function = f"{module}.{matrix.dtype.name.lower()}_{'by_vector' if one else 'by_tokens'}"
    grain = max(1, CHUNK * n_out // matrix.blocks.nbytes) if one else TILE
    place = {BLOCKS: matrix.blocks.ctypes.data, Y: y.ctypes.data, Y_STRIDE: y.strides[0] // 4}
    return _job(function, n_out, grain, activations.places | place)


@cache
def _entry(name: str) -> int:
    """The address of a kernel of a job and a range of rows, as the field FUNCTION wants it."""
    return kernel(name).address((INTEGER,) * 3)
