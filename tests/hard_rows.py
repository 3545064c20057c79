"""Rows of weights, ordinary and awkward, and importances of columns: what the tests of quantized dtypes encode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
MODELS = {
    "stories260k": Path(__file__).parents[2] / "shared" / "data" / "stories260k",
    "tiny-llama": Path(__file__).parents[1] / "fixtures" / "tiny-llama",
}


def ordinary_rows(n_columns: int, n_rows: int = 37) -> dict[str, Floats]:
    """By name, (n_rows, n_columns) of random weights. 37 rows: no number of blocks is a multiple of the lanes."""
    random = np.random.default_rng(20230330)
    gaussian = random.standard_normal((n_rows, n_columns), np.float32) * np.float32(0.02)
    return {
        "gaussian": gaussian,
        "heavy tails": random.standard_t(2, (n_rows, n_columns)).astype(np.float32),
        "bfloat16": (gaussian.view(np.uint32) & 0xFFFF0000).view(np.float32),
        "integers": random.integers(-16, 17, (n_rows, n_columns)).astype(np.float32),  # exact ties
        "one row": gaussian[:1],
    }


def edge_rows(n_columns: int) -> Floats:
    """(n, n_columns), each row awkward in its own way. No value is subnormal: there ggml's C is undefined."""
    random = np.random.default_rng(613)
    gaussian = random.standard_normal((8, n_columns), np.float32)
    column = np.arange(n_columns)
    rows = [
        np.zeros(n_columns),
        np.full(n_columns, -0.0),
        random.choice([0.0, -0.0], n_columns),
        random.choice([0.0, -0.0, 1.0], n_columns),
        random.choice([0.0, -0.0, -1.0], n_columns),
        np.full(n_columns, 0.7),
        np.full(n_columns, -0.7),
        np.where(column % 2, 1.0, -1.0),  # the largest and the least are equally large
        np.where(column % 7, 0.0, 3.0),
        np.where(column % 32 == 31, -5.0, 0.0),
        np.where(column % 32 == 0, 1000.0, gaussian[0]),
        (column % 32) / 31.0,
        (column % 32) / -31.0,
        (column % 16 - 8) * 0.125,
        gaussian[1] * 1e-7,  # scales below float16's least
        gaussian[2] * 1e-20,
        gaussian[3] * 1e-14,  # around what ggml takes for zero
        gaussian[3] * 1e-15,
        gaussian[4] * 1e4,  # scales above float16's greatest
        gaussian[5] * 1e15,
        np.abs(gaussian[6]),
        -np.abs(gaussian[7]),
        np.where(column < n_columns // 2, 0.0, gaussian[0]),
        -0.7 + gaussian[1] * 1e-7,  # all but constant: the span from minimum to greatest weight nearly vanishes
        -0.7 + gaussian[2] * 1e-5,
        0.7 + gaussian[3] * 1e-7,
    ]
    return np.array(rows, np.float32)


def subnormal_rows(n_columns: int) -> Floats:
    """(n, n_columns) of weights that are subnormal or all but, where ggml's C is undefined and processors differ."""
    random = np.random.default_rng(1074)
    gaussian = random.standard_normal((6, n_columns))
    rows = gaussian * [[1e-36], [1e-38], [1e-40], [1e-43], [1e-45], [1.0]]
    rows[5] = np.where(np.arange(n_columns) % 32, 1e-40, 1.0) * gaussian[5]
    return rows.astype(np.float32)


def real_rows(model: str, n_columns: int) -> Floats:
    """Weights of stories260k or tiny-llama, one after the other, cut into rows; of the latter, every seventh row.

    Skips where they are not at hand.
    """
    import pytest  # not above: digests.py runs where there is no pytest

    torch = pytest.importorskip("torch")
    files = sorted(MODELS[model].glob("consolidated.*.pth"))
    if not files:
        pytest.skip("needs ../shared/data")
    tensors = [tensor for file in files for tensor in torch.load(file, weights_only=True).values()]
    flat = np.concatenate([tensor.float().numpy().ravel() for tensor in tensors if tensor.ndim == 2])
    rows = flat[: flat.size // n_columns * n_columns].reshape(-1, n_columns)
    return rows[:: 7 if model == "tiny-llama" else 1]


def importances(n_columns: int) -> dict[str, Floats]:
    """By name, (n_columns,): how much the error in a column counts."""
    random = np.random.default_rng(7)
    return {
        "equal": np.ones(n_columns, np.float32),
        "like an imatrix": random.standard_t(2, n_columns).astype(np.float32) ** 2,
        "zeros among them": random.random(n_columns, np.float32) * (random.random(n_columns) < 0.5),
        "all zero": np.zeros(n_columns, np.float32),
        "huge": random.random(n_columns, np.float32) * np.float32(1e20),
    }
