"""Products of matrices, as they lie in the file, and activations: what is asked of the team, and in which memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from llamatools.dtypes import Blocks, DType, Floats
from llamatools.dtypes.compiled import INTEGER

from .recorded import record
from .team import kernel, team

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


class Rows:
    """A matrix that can be multiplied as it lies in memory, and what there is to say of it to a kernel.

    blocks: (n_out, blocks per row), contiguous, which must not move.
    """

    def __init__(self, dtype: DType, blocks: Blocks) -> None:
        self.dtype = dtype
        self.n_out = len(blocks)
        self.module, self.columns = KERNELS[dtype.name]
        self._address, self._nbytes = int(blocks.ctypes.data), blocks.nbytes
        self._jobs: dict[bool, list[int]] = {}

    def job(self, is_one_token: bool) -> list[int]:
        """The fields up to BLOCKS."""
        if is_one_token not in self._jobs:
            function = _entry(f"{self.module}.{self.dtype.name.lower()}_{'by_vector' if is_one_token else 'by_tokens'}")
            grain = max(1, CHUNK * self.n_out // self._nbytes) if is_one_token else TILE
            self._jobs[is_one_token] = [function, self.n_out, grain, 0, self._address]
        return self._jobs[is_one_token]


def has_kernel(dtype: DType, n_tokens: int) -> bool:
    """Whether rows of the dtype can be multiplied by so many tokens without decoding them."""
    return dtype.name in KERNELS and (dtype.is_quantized or n_tokens == 1)


def products(matrices: Sequence[Rows], x: Floats) -> list[Floats]:
    """x times each matrix's transpose: (n_tokens, n_in) -> (n_tokens, n_out) each, for matrices that have a kernel.

    x is quantized once for all matrices of one kind of block, and their rows are divided among the threads together.
    """
    n_tokens = len(x)
    x = np.ascontiguousarray(x, np.float32)
    y_stride = sum([matrix.n_out for matrix in matrices])
    y = np.empty((n_tokens, y_stride), np.float32)
    place = int(y.ctypes.data)
    results: list[Floats] = []
    jobs: dict[int, list[int]] = {}  # by the kind of activations
    activations = _Activations(x)
    first = 0
    for matrix in matrices:
        job = jobs.setdefault(matrix.columns, [])
        job += [*matrix.job(n_tokens == 1), place + 4 * first, y_stride, *activations.fields]
        results.append(y[:, first : first + matrix.n_out])
        first += matrix.n_out
    for columns, of_matrices in jobs.items():
        if columns:
            quantization = [_entry(f"activations.quantize_by_{columns}"), n_tokens, TOKENS, 0, 0, 0, 0]
            of_matrices = [*quantization, *activations.fields, *of_matrices]
        n_first = 1 if columns else 0
        record(of_matrices, (activations, y), n_first)
        team().run(of_matrices, n_first)
    return results


class _Activations:
    """x (n_tokens, n_in) and memory to quantize it in. fields: those of a job from X on, the last unused."""

    def __init__(self, x: Floats) -> None:
        n_tokens, n_in = x.shape
        n_blocks = -(-n_in // 128) * 4  # rows by a vector read four blocks at a time
        n = n_blocks * n_tokens
        self._x, self._memory = x, np.empty(64 + 32 * n + 3 * 4 * n + 4 * 4 * n_blocks, np.uint8)
        codes = -(-int(self._memory.ctypes.data) // 64) * 64
        scales = codes + 32 * n
        self.fields = [int(x.ctypes.data), n_in, n_tokens, codes]
        self.fields += [scales, scales + 4 * n, scales + 8 * n, scales + 12 * n, 0]


@cache
def _entry(name: str) -> int:
    """The address of a kernel of a job and a range of rows, as the field FUNCTION wants it."""
    return kernel(name).address((INTEGER,) * 3)
