"""How fast each dtype encodes and decodes on one thread, against ggml's C.

    python tests/bench/kernels.py [--dtypes Q4_0,Q8_0] [--megabytes 32] [--runs 5] [--json]

Prints MB/s of float32 in (encode) or out (decode), medians of `--runs`, ours and C in turn, and their ratio. C is the
library inside the xllamacpp wheel, which is built for plain x86-64 or arm64 (a llama.cpp built for the host is faster).
What both wrote is compared, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import llamacpp

from llamatools import dtypes

ROW = 4096


def median_seconds(runs: int, *functions: Callable[[], object]) -> list[float]:
    """Of each function, called in turn, `runs` times after one that does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for run in range(runs + 1):
        for seconds, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            if run:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def measure(name: str, values: np.ndarray, importance: np.ndarray, runs: int) -> list[dict[str, Any]]:
    dtype = dtypes.named(name)
    blocks = llamacpp.quantize(dtype.id, values).view(dtype.block)
    jobs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    if dtype.encode is not None:
        jobs["encode"] = (lambda: dtype.encode(values, None), lambda: llamacpp.quantize(dtype.id, values))
        jobs["encode, importance"] = (
            lambda: dtype.encode(values, importance),
            lambda: llamacpp.quantize(dtype.id, values, importance),
        )
    jobs["decode"] = (lambda: dtype.decode(blocks), lambda: llamacpp.dequantize(dtype.id, blocks, ROW))
    lines = []
    for job, (ours, theirs) in jobs.items():
        same = bool((ours().view(np.uint8) == theirs().view(np.uint8)).all())
        our_time, their_time = median_seconds(runs, ours, theirs)
        speeds = [values.nbytes / seconds / 1e6 for seconds in (our_time, their_time)]
        lines.append({"dtype": name, "job": job, "MB/s": speeds[0], "C MB/s": speeds[1], "same bytes": same})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [dtype.name for dtype in dtypes.TABLE if dtype.is_quantized and dtype.decode is not None]
    parser.add_argument("--dtypes", default=",".join(known))
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    random = np.random.default_rng(1)
    n_rows = options.megabytes * 2**20 // (4 * ROW)
    values = random.standard_normal((n_rows, ROW), np.float32) * np.float32(0.02)
    importance = random.random(ROW, np.float32)
    for name in options.dtypes.split(","):
        for line in measure(name, values, importance, options.runs):
            if options.json:
                print(json.dumps(line))
            else:
                ratio = line["MB/s"] / line["C MB/s"]
                print(
                    f"{name:8}{line['job']:20}{line['MB/s']:9.0f} MB/s{line['C MB/s']:9.0f} C{ratio:7.1f}x"
                    f"  {'same bytes' if line['same bytes'] else 'OTHER BYTES'}"
                )


if __name__ == "__main__":
    main()
