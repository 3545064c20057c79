"""How long `llamatools convert` takes against `cp`, and how much memory.

    python tests/bench/convert.py FOLDER [--shape tinyllama|7b|13b] [--runs 5]

FOLDER should lie on a RAM disk for timings (2.2 GB twice) and on a real disk for the larger shapes (13.5 and 26 GB,
twice). Makes a seeded bfloat16 checkpoint there, then runs `cp` of its shards and the conversion in turn, as whole
processes, and prints medians, their ratio, and the peak of anonymous memory (RssAnon, read from /proc every few
milliseconds).
Deletes what it made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.serialization import skip_data

from llamatools.formats.pth import read_pth

SHAPES = {
    # dim, layers, heads, kv heads, hidden, vocabulary, shards
    "tinyllama": (2048, 22, 32, 4, 5632, 32000, 1),
    "7b": (4096, 32, 32, 32, 11008, 32000, 1),
    "13b": (5120, 40, 40, 40, 13824, 32000, 2),
}
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is timed has its bytecode, as an installed package has
ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizers" / "llama2.model"


def make_checkpoint(folder: Path, shape: str) -> list[Path]:
    """Writes the files of a Meta checkpoint with seeded bfloat16 weights, a shard at a time, in little memory."""
    dim, n_layers, n_heads, n_kv_heads, hidden, vocab, n_shards = SHAPES[shape]
    head_dim = dim // n_heads
    folder.mkdir(parents=True)
    params = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "multiple_of": 256}
    (folder / "params.json").write_text(json.dumps({**params, "norm_eps": 1e-5, "vocab_size": -1}))
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    across, along = (lambda rows, cols: (rows // n_shards, cols)), (lambda rows, cols: (rows, cols // n_shards))
    shapes = {"tok_embeddings.weight": along(vocab, dim), "norm.weight": (dim,), "output.weight": across(vocab, dim)}
    for n in range(n_layers):
        layer = {
            "attention.wq": across(dim, dim),
            "attention.wk": across(n_kv_heads * head_dim, dim),
            "attention.wv": across(n_kv_heads * head_dim, dim),
            "attention.wo": along(dim, dim),
            "feed_forward.w1": across(hidden, dim),
            "feed_forward.w3": across(hidden, dim),
            "feed_forward.w2": along(dim, hidden),
            "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }
        shapes |= {f"layers.{n}.{name}.weight": size for name, size in layer.items()}
    paths = []
    for shard in range(n_shards):
        path = folder / f"consolidated.{shard:02}.pth"
        with skip_data():  # leaves room for the weights, which are written below
            torch.save({name: torch.empty(size, dtype=torch.bfloat16) for name, size in shapes.items()}, path)
        _fill(path, seed=shard)
        paths.append(path)
    return paths


def _fill(path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    with open(path, "r+b") as file:
        for tensor in read_pth(path).tensors.values():
            file.seek(tensor.offset)
            if len(tensor.shape) == 1:  # norms are the same in every shard
                file.write(np.full(tensor.n_weights, 0x3F80, "<u2").tobytes())
                continue
            left = tensor.nbytes
            while left:
                values = generator.standard_normal(min(left // 2, 1 << 22), np.float32) * np.float32(0.02)
                left -= file.write((values.view("<u4") >> 16).astype("<u2").tobytes())


def timed(command: list[str], **environment: str) -> tuple[float, int]:
    """Seconds that the command took as a whole process, and the peak of its RssAnon in bytes.

    environment: variables that it sees besides ours.
    """
    peak = 0
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        except (FileNotFoundError, ProcessLookupError):
            break
        if lines:
            peak = max(peak, int(lines[0].split()[1]) << 10)
        time.sleep(0.005)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(errors)
    return time.perf_counter() - started, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    source, copy, gguf = (arguments.folder / f"bench-{name}" for name in ("source", "copy", "model.gguf"))
    try:
        shards = make_checkpoint(source, arguments.shape)
        nbytes = sum(path.stat().st_size for path in shards)
        convert = [sys.executable, "-m", "llamatools", "convert", str(source), str(gguf)]
        copies, conversions, peaks = [], [], []
        for _ in range(arguments.runs):
            copy.mkdir()
            copies.append(timed(["cp", *map(str, shards), str(copy)])[0])
            shutil.rmtree(copy)
            seconds, peak = timed(convert)
            gguf.unlink()
            conversions.append(seconds)
            peaks.append(peak)
        cp, conversion = statistics.median(copies), statistics.median(conversions)
        print(f"checkpoint        {nbytes / 1e9:.2f} GB in {len(shards)} shards")
        print(f"cp                {cp:.2f} s median of {[round(s, 2) for s in copies]}")
        print(f"convert           {conversion:.2f} s median of {[round(s, 2) for s in conversions]}")
        print(f"convert / cp      {conversion / cp:.2f}; 1.5 * cp + 0.5 s is {1.5 * cp + 0.5:.2f} s")
        print(f"RssAnon           {max(peaks) / 1e6:.0f} MB at most")
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(copy, ignore_errors=True)
        gguf.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
