"""How long `llamatools quantize` takes against llama-quantize, and how much memory.

    python tests/bench/quantize.py FOLDER LLAMA_QUANTIZE [--shape tinyllama|13b] [--recipes q4_0,q4_k_m,q6_k] [--runs 5]

FOLDER should lie on a RAM disk for timings (6 GB are needed there). Makes a seeded bfloat16 checkpoint, its GGUF and an
importance matrix, then runs both tools in turn as whole processes with two threads each: without and with the matrix,
ours with `--rounding search`, too, and in one pass from the checkpoint. Prints medians, ratios of medians and the peak
of anonymous memory (RssAnon). What both wrote is compared, tensor by tensor. Deletes what it made.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import struct
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from convert import SHAPES, make_checkpoint, timed

import llamatools
from llamatools.provenance import recorded_digests

THREADS = "2"


def make_imatrix(path: Path, gguf: Path) -> None:
    """Importances as heavy-tailed as those of real models, in llama.cpp's older form."""
    draws = np.random.default_rng(0)
    tensors = [t for t in llamatools.inspect(gguf).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    data = struct.pack("<i", len(tensors))
    for tensor in tensors:
        data += struct.pack("<i", len(tensor.name)) + tensor.name.encode() + struct.pack("<ii", 1, tensor.shape[-1])
        data += np.exp(2 * draws.standard_normal(tensor.shape[-1])).astype("<f4").tobytes()
    path.write_bytes(data)


def differing(ours: Path, theirs: Path) -> int:
    """How many tensors of llama-quantize's file have not the dtype and digest that ours records."""
    recorded = recorded_digests(llamatools.inspect(ours).metadata)
    n = 0
    for tensor in llamatools.inspect(theirs).tensors:
        assert tensor.source is not None
        digest = hashlib.sha256()
        for row in range(0, tensor.source.n_rows, 256):
            digest.update(tensor.source.read(row, min(row + 256, tensor.source.n_rows)).tobytes())
        n += recorded[tensor.name].is_stale(tensor) or recorded[tensor.name].sha256 != digest.hexdigest()
    return n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("llama_quantize", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--recipes", default="q4_0,q4_k_m,q6_k")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    meta, gguf, imatrix, ours, theirs = (
        arguments.folder / f"bench-{name}" for name in ("meta", "model.gguf", "imatrix.dat", "ours.gguf", "theirs.gguf")
    )
    llamatools_command = [sys.executable, "-m", "llamatools"]
    try:
        make_checkpoint(meta, arguments.shape)
        llamatools.convert(meta, gguf)
        make_imatrix(imatrix, gguf)
        for recipe in arguments.recipes.split(","):
            quantize = [*llamatools_command, "quantize", gguf, ours, recipe, "--force", "--threads", THREADS]
            convert = [*llamatools_command, "convert", meta, ours, "--dtype", recipe, "--force", "--threads", THREADS]
            reference = [arguments.llama_quantize, gguf, theirs, recipe, THREADS]
            weighted = ["--imatrix", imatrix]
            jobs = {
                "llama-quantize": reference,
                "exact": quantize,
                "one pass": convert,
                "llama-quantize, imatrix": [reference[0], *weighted, *reference[1:]],
                "exact, imatrix": [*quantize, *weighted],
                "search, imatrix": [*quantize, *weighted, "--rounding", "search"],
            }
            seconds: dict[str, list[float]] = {job: [] for job in jobs}
            peaks = dict.fromkeys(jobs, 0)
            same = {}
            for run in range(-1, arguments.runs):  # the first warms the caches and does not count
                for job, command in jobs.items():
                    elapsed, peak = timed(list(map(str, command)))
                    peaks[job] = max(peaks[job], peak)
                    if run >= 0:
                        seconds[job].append(elapsed)
                    if run < 0 and job.startswith("exact"):
                        same[job] = differing(ours, theirs)
            medians = {job: statistics.median(times) for job, times in seconds.items()}
            print(recipe)
            for job in jobs:
                base = medians["llama-quantize, imatrix" if "imatrix" in job else "llama-quantize"]
                against = f"{base / medians[job]:5.1f} times as fast" if "llama" not in job else ""
                tensors = f", {same[job]} tensors differ" if job in same else ""
                print(f"  {job:25}{medians[job]:7.2f} s  {peaks[job] / 1e6:5.0f} MB  {against}{tensors}")
            print(f"  one pass / exact         {medians['one pass'] / medians['exact']:7.2f}", flush=True)
    finally:
        shutil.rmtree(meta, ignore_errors=True)
        for path in (gguf, imatrix, ours, theirs):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
