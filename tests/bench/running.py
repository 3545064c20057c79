"""How fast a whole model writes and reads, against llama-bench, and how soon it begins, against llama-simple.

    python tests/bench/running.py MODEL.gguf LLAMA_BIN [--threads 2] [--runs 5] [--json]

LLAMA_BIN is the folder of llama-bench and llama-simple. All take turns, several times over: ours, llama-bench as it is,
which repacks weights into a second copy where it can, and llama-bench with repacking off. Each warms up first. Prints
medians of tokens per second for 32 tokens written from an empty context and for prompts of 64 and 512 tokens, GB/s of
weights while writing, and the ratios; and after how many seconds each program, started with a warm page cache, has
written its first token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is timed has its bytecode, as an installed package has
WRITTEN, PROMPTS = 32, (64, 512)
PROMPT = "Once upon a time"


def ours(path: Path, threads: int) -> dict[str, float]:
    """Tokens per second in this process, as llama-bench counts them: the model is loaded, the caches are warm."""
    from llamatools_runtime import Cache, forward, load
    from llamatools_runtime.kernels.team import team

    team(threads)
    model, _ = load(path)
    ids = np.random.default_rng(0).integers(3, model.hparams.vocab_size, max(PROMPTS))
    for n in (1, *PROMPTS):  # also compiles what is not kept yet
        forward(model, ids[:n], Cache.of(model.hparams, n), last_only=True)

    speeds = {}
    for n in PROMPTS:
        cache = Cache.of(model.hparams, n)
        started = time.perf_counter()
        forward(model, ids[:n], cache, last_only=True)
        speeds[f"pp{n}"] = n / (time.perf_counter() - started)
    cache = Cache.of(model.hparams, WRITTEN)
    started = time.perf_counter()
    for k in range(WRITTEN):
        forward(model, ids[k : k + 1], cache, last_only=True)
    speeds[f"tg{WRITTEN}"] = WRITTEN / (time.perf_counter() - started)
    return speeds


def theirs(path: Path, threads: int, llama_bin: Path, repack: int) -> dict[str, float]:
    command = [llama_bin / "llama-bench", "-m", path, "-t", threads, "-p", ",".join(map(str, PROMPTS)), "-n", WRITTEN]
    output = subprocess.run(
        [*map(str, command), "-r", "1", "--repack", str(repack), "-o", "json"], capture_output=True, check=True
    ).stdout
    return {
        f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']}": test["avg_ts"]
        for test in json.loads(output)
    }


def first_token(command: list[str]) -> float:
    """Seconds from the start of a process to its first bytes on stdout: llama-simple writes the prompt with them."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    assert process.returncode == 0
    return seconds


def measured(path: Path, llama_bin: Path, threads: int, runs: int) -> dict[str, dict[str, float]]:
    """Medians by who and what."""
    again = [sys.executable, __file__, str(path), str(llama_bin), "--threads", str(threads), "--only-ours"]
    run = [sys.executable, "-m", "llamatools", "run", str(path), "--prompt", PROMPT, "--max-tokens", "1"]
    simple = [str(llama_bin / "llama-simple"), "-m", str(path), "-n", "1", PROMPT]
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for n in range(-1, runs):  # the first warms the page cache and does not count
        turn = {
            "ours": json.loads(subprocess.run(again, capture_output=True, check=True).stdout),
            "llama-bench": theirs(path, threads, llama_bin, 1),
            "llama-bench, in place": theirs(path, threads, llama_bin, 0),
        }
        turn["ours"]["first"] = first_token([*run, "--threads", str(threads)])
        turn["llama-simple"] = {"first": first_token(simple)}
        for who, speeds in turn.items():
            for what, speed in speeds.items():
                if n >= 0:
                    seen[who][what].append(speed)
    return {who: {what: statistics.median(all_) for what, all_ in of.items()} for who, of in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("llama_bin", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only-ours", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_ours:
        print(json.dumps(ours(arguments.model, arguments.threads)))
        return
    medians = measured(arguments.model, arguments.llama_bin, arguments.threads, arguments.runs)
    if arguments.json:
        print(json.dumps(medians, indent=1))
        return
    mine, simple = medians["ours"], medians.pop("llama-simple")
    whats = [f"tg{WRITTEN}", *(f"pp{n}" for n in PROMPTS)]
    print(f"{'tokens per second':24}" + "".join(f"{what:>16}" for what in whats))
    for who, speeds in medians.items():
        ratios = [f"{mine[what] / speeds[what]:6.2f}x" if who != "ours" else " " * 7 for what in whats]
        print(f"{who:24}" + "".join(f"{speeds[what]:8.1f} {ratio}" for what, ratio in zip(whats, ratios, strict=True)))
    print(f"weights read while writing: {mine[whats[0]] * os.path.getsize(arguments.model) / 1e9:.1f} GB/s")
    first, their_first = mine["first"], simple["first"]
    print(f"first token: {first:.2f} s, llama-simple {their_first:.2f} s, {first / their_first:.2f}x")


if __name__ == "__main__":
    main()
