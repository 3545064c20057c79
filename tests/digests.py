"""Prints, as JSON, a digest of what every dtype that can encode or decode makes of the same rows and blocks.

Run by test_simd.py on different processors, real or pretended, whose digests must be equal.
"""

from __future__ import annotations

import json
from hashlib import sha256

import numpy as np
from hard_rows import edge_rows, importances, ordinary_rows

from llamatools import dtypes

N_COLUMNS = 768


def main() -> None:
    rows = np.concatenate([*ordinary_rows(N_COLUMNS, n_rows=5).values(), edge_rows(N_COLUMNS)])
    importance = importances(N_COLUMNS)["like an imatrix"]
    digests = {}
    for dtype in dtypes.TABLE:
        if dtype.is_quantized and dtype.encode is not None:
            for name, columns in (("encoded", None), ("encoded with importance", importance)):
                digests[f"{dtype} {name}"] = sha256(dtype.encode(rows, columns).tobytes()).hexdigest()
        if dtype.is_quantized and dtype.decode is not None:
            blocks = np.random.default_rng(5).integers(0, 256, (9, 100 * dtype.block_nbytes), np.uint8)
            values = dtype.decode(blocks.view(dtype.block))
            values[np.isnan(values)] = np.nan  # whose sign is the processor's choice
            digests[f"{dtype} decoded"] = sha256(values.tobytes()).hexdigest()
    print(json.dumps(digests, indent=1))


if __name__ == "__main__":
    main()
