"""How fast a model's matrices are multiplied, for one token and for prompts, against what memory can deliver.

    python tests/bench/multiply.py MODEL.gguf [--threads 2] [--tokens 1,64,512] [--runs 7] [--json]

Multiplies by every matrix of the model once per run, as a token or a prompt does, but without attention and the rest.
Prints the median in tokens per second, in GB/s of weights, and in operations per second; and, for one token, the share
of the limit: how fast as many threads read the same bytes and only add them up. Other programs disturb all of this.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from llamatools_runtime.kernels.job import BLOCKS, FUNCTION, GRAIN, N_FIELDS, N_ROWS, Y
from llamatools_runtime.kernels.team import team
from llamatools_runtime.load import load
from llamatools_runtime.model import Model
from llamatools_runtime.weights import Matrix, matmuls

from llamatools.dtypes.compiled import INTEGER
from llamatools.dtypes.simd import I32x16, I64x16, array_at, kernel, prefetch, reduce_add, splat
from llamatools.dtypes.simd import load as load_vector

PIECE = 1 << 16  # bytes that are read at a time


@kernel
def read(job: int, start: int, stop: int) -> None:
    """Adds up pieces start to stop of what lies at BLOCKS."""
    fields = array_at(I64x16, job)
    numbers, sums = array_at(I32x16, fields[BLOCKS]), array_at(I32x16, fields[Y])
    for piece in range(start, stop):
        one, two = splat(I32x16, 0), splat(I32x16, 0)
        for i in range(piece * 16384, piece * 16384 + 16384, 32):
            prefetch(numbers, i + 768)
            prefetch(numbers, i + 784)
            one, two = one + load_vector(I32x16, numbers, i), two + load_vector(I32x16, numbers, i + 16)
        sums[piece] = reduce_add(one + two)


def groups(model: Model) -> Iterator[list[Matrix]]:
    """The matrices in the order of use; those of the same activations together."""
    for layer in model.layers:
        yield from ([layer.wq, layer.wk, layer.wv], [layer.wo], [layer.w1, layer.w3], [layer.w2])
    yield [model.output]


def reading(matrices: list[Matrix]) -> Callable[[], None]:
    """A function that only reads the matrices."""
    n_pieces = [matrix.blocks.nbytes // PIECE for matrix in matrices]
    sums = np.zeros(max(n_pieces), np.int32)
    jobs = np.zeros((len(matrices), N_FIELDS), np.int64)
    jobs[:, FUNCTION], jobs[:, N_ROWS], jobs[:, GRAIN] = read.address((INTEGER,) * 3), n_pieces, 2
    jobs[:, BLOCKS], jobs[:, Y] = [matrix.blocks.ctypes.data for matrix in matrices], sums.ctypes.data

    def read_all() -> None:
        team().run(jobs.reshape(-1).tolist())
        assert sums.any()

    return read_all


def multiplying(model: Model, n_tokens: int) -> Callable[[], None]:
    """A function that multiplies by all matrices, the last one by the last token only."""
    draws = np.random.default_rng(0)
    inputs = {n_in: draws.standard_normal((n_tokens, n_in), np.float32) for n_in in widths(model)}

    def multiply() -> None:
        for matrices in groups(model):
            x = inputs[matrices[0].shape[1]]
            matmuls(matrices, x[-1:] if matrices[0] is model.output else x)

    return multiply


def widths(model: Model) -> set[int]:
    return {matrix.shape[1] for matrices in groups(model) for matrix in matrices}


def medians(runs: int, *functions: Callable[[], None]) -> list[float]:
    """Seconds of each, run in turn, after one run that does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for run in range(runs + 1):
        for seconds, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            if run:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", default="1,64,512")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model, _ = load(options.model)
    n_threads = team(options.threads).n_threads
    matrices = [matrix for group in groups(model) for matrix in group]
    nbytes = sum(matrix.blocks.nbytes for matrix in matrices)
    body = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices if matrix is not model.output)
    counts = [int(n) for n in options.tokens.split(",")]
    limit, *seconds = medians(options.runs, reading(matrices), *(multiplying(model, n) for n in counts))
    for n_tokens, elapsed in zip(counts, seconds, strict=True):
        line = {
            "threads": n_threads,
            "tokens": n_tokens,
            "tokens/s": n_tokens / elapsed,
            "GB/s": nbytes / elapsed / 1e9,
        }
        line |= {"limit GB/s": nbytes / limit / 1e9, "GOP/s": 2 * body * n_tokens / elapsed / 1e9}
        print(json.dumps(line) if options.json else "  ".join(f"{name} {value:.4g}" for name, value in line.items()))


if __name__ == "__main__":
    main()
