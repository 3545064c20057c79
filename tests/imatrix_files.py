"""Importance matrices for tests."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def write_imatrix(path: Path, columns: dict[str, int], seed: int = 1) -> Path:
    """An importance matrix in llama.cpp's older form, drawn for these tensors and numbers of columns.

    The same bytes on every processor, as numpy's powers are not.
    """
    draws = np.random.default_rng(seed)
    data = struct.pack("<i", len(columns))
    for name, n in columns.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 3, n)
        squares = np.square(draws.random(n, np.float32), dtype=np.float64)
        data += (3 * (squares * squares).astype("<f4")).tobytes()
    path.write_bytes(data + struct.pack("<ii", 8, 4) + b"text")
    return path
