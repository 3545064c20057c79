"""digests.py [DTYPE ...]: prints, as JSON, a digest of what each dtype makes of the same rows and blocks.

Of every dtype there is unless some are named: of its encode, with importance and without, its search and its decode.
Run on different processors, real, pretended or emulated, by test_processors.py and arm64/compare.py, whose digests must
be equal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from hashlib import sha256

import numpy as np
from hard_rows import edge_rows, importances, ordinary_rows, subnormal_rows

from llamatools import dtypes
from llamatools.dtypes import DType

N_COLUMNS = 768


def digests(dtype: DType) -> Iterator[tuple[str, str]]:
    """(what was done, digest of the bytes that came of it), of each thing that the dtype can do."""
    rows = [*ordinary_rows(N_COLUMNS, n_rows=5).values(), edge_rows(N_COLUMNS), subnormal_rows(N_COLUMNS)]
    weights = np.concatenate(rows)
    importance = importances(N_COLUMNS)["like an imatrix"]
    if dtype.encode is not None:
        yield "encoded", _digest(dtype.encode(weights, None))
        yield "encoded with importance", _digest(dtype.encode(weights, importance))
    if dtype.search is not None:
        yield "searched with importance", _digest(dtype.search(weights, importance))
    if dtype.decode is not None:
        blocks = np.random.default_rng(5).integers(0, 256, (9, 100 * dtype.block_nbytes), np.uint8)
        values = dtype.decode(blocks.view(dtype.block))
        yield "decoded", _digest(np.where(np.isnan(values), np.float32(np.nan), values))  # its sign is the processor's


def _digest(array: np.ndarray) -> str:
    return sha256(array.tobytes()).hexdigest()


def main(names: list[str]) -> None:
    chosen = [dtypes.named(name) for name in names] or dtypes.TABLE
    print(json.dumps({f"{dtype} {what}": digest for dtype in chosen for what, digest in digests(dtype)}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
