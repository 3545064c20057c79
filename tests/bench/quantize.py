"""How long `llamatools quantize` takes against llama-quantize, and how much memory.

    python tests/bench/quantize.py FOLDER [LLAMA_QUANTIZE] [--shape tinyllama|7b|13b] [--recipes q4_0,q4_k_m,q6_k]
                                   [--runs 5]

FOLDER should lie on a RAM disk for timings (7 GB are needed there) and on a real disk for the larger shapes. Makes a
seeded bfloat16 checkpoint, its GGUF and an importance matrix, then runs both tools in turn as whole processes with two
threads each: without and with the matrix, ours with `--rounding search`, too, and in one pass from the checkpoint.
Prints for each recipe

    seconds    the median
    ratio      how many times as fast as llama-quantize on the same; of the one pass, seconds over those of `exact`;
               of a first run ever ("cold", with no kernel kept), how many seconds it takes more than others
    asked      what the ratio is to be
    RssAnon    the peak of anonymous memory, which is to be 300 MB at most
    differ     tensors whose dtype or bytes are not those of llama-quantize

Without LLAMA_QUANTIZE ours is run alone, for its memory. Deletes what it made.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from convert import SHAPES, make_checkpoint, timed

import llamatools
from llamatools.provenance import recorded_digests

THREADS = "2"
LLAMA, LLAMA_WEIGHTED = "llama-quantize", "llama-quantize, imatrix"
TIMES_AS_FAST = {"q4_0": 3, "q4_k_m": 8, "q6_k": 6}  # `exact` without an imatrix
SEARCH_TIMES_AS_FAST, ONE_PASS_RATIO, COLD_SECONDS = 3, 1.2, 10
COLUMNS = "{:8}{:25}{:>9}{:>9}{:>9}{:>10}{:>8}"


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


def measure(recipe: str, folder: Path, llama_quantize: Path | None, runs: int) -> None:
    """Prints a line for each way to make this recipe's file of the model in `folder`."""
    meta, gguf, imatrix, ours, theirs = paths_in(folder)
    options = [recipe, "--force", "--threads", THREADS]
    quantize = [sys.executable, "-m", "llamatools", "quantize", gguf, ours, *options]
    convert = [sys.executable, "-m", "llamatools", "convert", meta, ours, "--dtype", *options]
    weighted = ["--imatrix", imatrix]
    searching = [*quantize, *weighted, "--rounding", "search"]
    jobs = {
        LLAMA: [llama_quantize, gguf, theirs, recipe, THREADS],
        "exact": quantize,
        "one pass": convert,
        LLAMA_WEIGHTED: [llama_quantize, *weighted, gguf, theirs, recipe, THREADS],
        "exact, imatrix": [*quantize, *weighted],
        "search, imatrix": searching,
    }
    if llama_quantize is None:
        del jobs[LLAMA], jobs[LLAMA_WEIGHTED]
    times: dict[str, list[float]] = {job: [] for job in jobs}
    peaks = dict.fromkeys(jobs, 0)
    differ = {}
    for run in range(-1, runs):  # the first warms the caches and does not count
        for job, command in jobs.items():
            written = theirs if job in (LLAMA, LLAMA_WEIGHTED) else ours
            written.unlink(missing_ok=True)  # so that its memory is at hand, whoever uses a new file or the old one
            elapsed, peak = timed(list(map(str, command)))
            peaks[job] = max(peaks[job], peak)
            if run >= 0:
                times[job].append(elapsed)
            elif job.startswith("exact") and llama_quantize:
                differ[job] = differing(ours, theirs)
    seconds = {job: statistics.median(of_job) for job, of_job in times.items()}
    for job, command in {"exact, cold": quantize, "search, imatrix, cold": searching}.items():
        with tempfile.TemporaryDirectory() as empty:
            seconds[job], peaks[job] = timed(list(map(str, command)), NUMBA_CACHE_DIR=empty)
    for job in seconds:
        ratio, asked = ratio_of(job, recipe, seconds)
        row = (f"{seconds[job]:.2f}", ratio, asked, f"{peaks[job] / 1e6:.0f} MB", str(differ.get(job, "")))
        print(COLUMNS.format(recipe, job, *row).rstrip(), flush=True)


def ratio_of(job: str, recipe: str, seconds: dict[str, float]) -> tuple[str, str]:
    """What the job's seconds are held against, and what was asked for."""
    if job.endswith(", cold"):
        return f"{seconds[job] - seconds[job.removesuffix(', cold')]:+.1f} s", f"<= {COLD_SECONDS} s"
    if job == "one pass":
        return f"{seconds[job] / seconds['exact']:.2f}", f"<= {ONE_PASS_RATIO}"
    base = LLAMA_WEIGHTED if "imatrix" in job else LLAMA
    if job == base or base not in seconds:
        return "", ""
    asked = SEARCH_TIMES_AS_FAST if job.startswith("search") else TIMES_AS_FAST.get(recipe) if job == "exact" else None
    return f"{seconds[base] / seconds[job]:.1f} x", f">= {asked} x" if asked else ""


def paths_in(folder: Path) -> tuple[Path, Path, Path, Path, Path]:
    """Checkpoint, GGUF, imatrix, what we make of it, what llama-quantize makes of it."""
    meta, gguf, imatrix, ours, theirs = (
        folder / f"bench-{name}" for name in ("meta", "model.gguf", "imatrix.dat", "ours.gguf", "theirs.gguf")
    )
    return meta, gguf, imatrix, ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("llama_quantize", type=Path, nargs="?")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--recipes", default="q4_0,q4_k_m,q6_k")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    meta, gguf, imatrix, *written = paths_in(arguments.folder)
    try:
        make_checkpoint(meta, arguments.shape)
        llamatools.convert(meta, gguf)
        make_imatrix(imatrix, gguf)
        print(f"{gguf.stat().st_size / 1e9:.1f} GB of bfloat16; medians of {arguments.runs}, {THREADS} threads")
        print(COLUMNS.format("recipe", "", "seconds", "ratio", "asked", "RssAnon", "differ"), flush=True)
        for recipe in arguments.recipes.split(","):
            measure(recipe, arguments.folder, arguments.llama_quantize, arguments.runs)
    finally:
        shutil.rmtree(meta, ignore_errors=True)
        for path in (gguf, imatrix, *written):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
