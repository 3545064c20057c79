"""product_digests.py [DTYPE ...]: prints, as JSON, digests of products of the same matrices and activations.

Run on different processors, real or pretended, by test_multiply.py; the digests must be equal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from hashlib import sha256

import numpy as np
from hard_rows import ordinary_rows
from llamatools_runtime.weights import Matrix, matmul

from llamatools import dtypes

N_COLUMNS = 768


def digests(names: list[str]) -> Iterator[tuple[str, str]]:
    """(dtype and number of tokens, digest of the product's bytes)."""
    x = np.random.default_rng(1).standard_normal((6, N_COLUMNS), np.float32)
    for name in names:
        dtype = dtypes.named(name)
        assert dtype.encode is not None
        blocks = dtype.encode(np.concatenate(list(ordinary_rows(N_COLUMNS, n_rows=5).values())), None)
        matrix = Matrix("w", dtype, (len(blocks), N_COLUMNS), blocks)
        for n_tokens in (1, 6):
            yield f"{name}, {n_tokens}", sha256(matmul(matrix, x[:n_tokens]).tobytes()).hexdigest()


if __name__ == "__main__":
    print(json.dumps(dict(digests(sys.argv[1:]))))
