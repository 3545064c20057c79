"""The experiment of 2023 anew: what a mapped model costs, and what one costs that is read into memory.

    python tests/bench/mapping.py MODEL.gguf [--shared OTHER.gguf] [--page FOLDER] [--runs 3]
    python tests/bench/mapping.py FOLDER [...]
    python tests/bench/mapping.py --from RESULTS.json --page FOLDER

The model must lie on a real disk (not on a RAM disk) with room for a copy of it beside. Given a folder instead, a
seeded model of TinyLlama's shape is made there, Q4_0, and in BF16 (2.2 GB) to be shared by eight processes; 5 GB are
needed, and everything is deleted in the end. Linux only; run it on a quiet machine, for some minutes. Measures

    start        reading against mapping, from a cold and from a warm page cache, until the first token
    processes    one to eight on one file: sums of RSS and Pss, and what the machine lacks
    cap          tokens per second, and bytes read again, where memory is 130 % to 29 % of the file
    alignment    32, 4096 and 2 MiB

--page: writes memory.md, its plots and its figures (memory.json) there; otherwise figures go to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from llamatools_runtime.counters import counters
from mapping_page import write_page
from memory_cap import NoCapError, kind_of_cap, memory_cap

import llamatools
from llamatools.check.residency import residency

WORKER = [sys.executable, str(Path(__file__).with_name("mapping_worker.py"))]
PERCENTS = (130, 115, 105, 95, 85, 70, 55, 40, 29)  # the last is what 5.8 GB are of 20 GB
ALIGNMENTS = (32, 4096, 2 << 20)
N_PROCESSES = 8
SPARE = 0.7  # of the memory that is available may be taken by models that are read
TIME_LIMIT = 600  # seconds for a process under a cap

Facts = dict[str, Any]


class KilledError(Exception):
    """The system ended a process for want of memory."""


def worker(path: Path, by: str, n_tokens: int, *, prefix: Sequence[str] = ()) -> Facts:
    """What mapping_worker.py prints. prefix: what its command begins with."""
    command = [*prefix, *WORKER, str(path), by, str(n_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT)
    if done.returncode == -9:
        raise KilledError
    if done.returncode:
        sys.exit(done.stderr)
    facts: Facts = json.loads(done.stdout)
    return facts


def make_cold(path: Path) -> None:
    """Drops a file from the page cache, and sees that it is gone."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        for _ in range(20):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not residency(path).between(0, path.stat().st_size):
                return
            time.sleep(0.1)
    sys.exit(f"{path}: it stays in the page cache. Is it on a RAM disk, or mapped by another process?")


def make_warm(path: Path) -> None:
    """Reads a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 22)
        while file.readinto(buffer):
            pass


def start(path: Path, runs: int) -> list[Facts]:
    """For each way and state of the page cache, each run's seconds and what was read from the disk."""
    found = {(by, state): list[Facts]() for state in ("cold", "warm") for by in ("read", "map")}
    for run in range(-1, runs):  # the first compiles kernels where none are kept, and does not count
        for (by, state), results in found.items():
            (make_cold if state == "cold" else make_warm)(path)
            facts = worker(path, by, 3)
            if run >= 0:
                results.append(facts)
    return [
        {"by": by, "state": state, **summary(results), "kinds": results[0]["kinds"]}
        for (by, state), results in found.items()
    ]


def summary(results: Sequence[Facts]) -> Facts:
    """Medians of several runs of the same."""

    def median(values: Iterator[float]) -> float:
        return statistics.median(values)

    def of_token_1(name: str) -> float:
        return median(facts["stages"]["token 1"][name] for facts in results)

    def since_before(name: str) -> float:
        return median(facts["stages"]["token 1"][name] - facts["stages"]["before"][name] for facts in results)

    return {
        "load_seconds": median(facts["seconds"][0] for facts in results),
        "first_seconds": median(facts["seconds"][1] for facts in results),
        "steady_seconds": median(statistics.mean(facts["seconds"][2:]) for facts in results),
        "cached_before": max(facts["stages"]["before"]["model_in_page_cache"] for facts in results),
        "device_read": since_before("device_read"),
        "minor_faults": since_before("minor_faults"),
        "major_faults": since_before("major_faults"),
        "rss_anon": of_token_1("rss_anon"),
        "mapped": of_token_1("mapped"),
        "runs": [facts["seconds"] for facts in results],
    }


def processes(path: Path, by: str, most: int) -> list[Facts]:
    """One process more at a time on one file, each with its first token: the sums over all of them."""
    worker(path, by, 1)  # compiles kernels where none are kept
    make_cold(path)
    free, available = machine("MemFree"), machine("MemAvailable")
    alive: list[subprocess.Popen[str]] = []
    found = []
    try:
        for n in range(1, most + 1):
            command = [*WORKER, str(path), by, "1", "wait"]
            alive.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            stdout = alive[-1].stdout
            assert stdout is not None
            if not stdout.readline():
                sys.exit(f"process {n} of {most} on {path} ended early")
            counted = [counters([path], process.pid) for process in alive]
            found.append(
                {
                    "n": n,
                    "rss": sum(c.rss_anon + c.rss_file for c in counted),
                    "pss": sum(c.pss for c in counted),
                    "private": sum(c.rss_anon for c in counted),
                    "used": free - machine("MemFree"),
                    "lacking": available - machine("MemAvailable"),
                }
            )
    finally:
        for process in alive:
            process.communicate("\n")
    return found


def machine(name: str) -> int:
    """A figure of /proc/meminfo, in bytes."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) << 10


def caps(path: Path, private: int) -> Facts:
    """Ten tokens under each cap, mapped and read; `how` says what caps, or why nothing does.

    private: bytes that a process needs besides the weights, which are given on top.
    """
    try:
        how = kind_of_cap()
    except NoCapError as error:
        return {"how": None, "why": str(error), "points": []}
    points = []
    for percent in PERCENTS:
        for by in ("map", "read"):
            make_cold(path)
            point = {"percent": percent, "by": by}
            try:
                with memory_cap(private + path.stat().st_size * percent // 100) as prefix:
                    facts = worker(path, by, 10, prefix=prefix)
            except KilledError:
                points.append({**point, "outcome": "killed"})
                continue
            first, tenth = facts["stages"]["token 1"], facts["stages"]["token 10"]
            steady = facts["seconds"][2:]
            each = {
                name: (tenth[name] - first[name]) / len(steady)
                for name in ("device_read", "minor_faults", "major_faults")
            }
            kept = {name: tenth[name] for name in ("rss_anon", "rss_file", "mapped", "model_in_page_cache")}
            rate = 1 / statistics.mean(steady)
            points.append({**point, "outcome": "ran", "rate": rate, **each, **kept, "kinds": facts["kinds"]})
    return {"how": how, "why": None, "private": private, "points": points}


def alignments(path: Path, runs: int) -> list[Facts]:
    """The same model laid out with each alignment, in turn cold and warm."""
    copies = {n: path.with_name(f".{path.stem}-align-{n}.gguf") for n in ALIGNMENTS}
    found: dict[tuple[int, str], list[Facts]] = {(n, state): [] for n in ALIGNMENTS for state in ("cold", "warm")}
    try:
        for n, copy in copies.items():
            llamatools.convert(path, copy, alignment=n, force=True)
        for _ in range(runs):
            for (n, state), results in found.items():
                (make_cold if state == "cold" else make_warm)(copies[n])
                results.append(worker(copies[n], "map", 6))
        sizes = {n: copy.stat().st_size for n, copy in copies.items()}
    finally:
        for copy in copies.values():
            copy.unlink(missing_ok=True)
    return [{"alignment": n, "size": sizes[n], "state": s, **summary(results)} for (n, s), results in found.items()]


def facts_of(path: Path) -> Facts:
    """What a file is, for the page."""
    layout = llamatools.inspect(path)
    dtypes = layout.nbytes_by_dtype()
    embedding = next(tensor.nbytes for tensor in layout.tensors if tensor.name == "token_embd.weight")
    return {
        "size": layout.size,
        "dtype": max(dtypes, key=lambda dtype: dtypes[dtype]).name,
        "n_weights": layout.n_weights,
        "n_layers": layout.hparams.n_layers if layout.hparams else None,
        "embedding": embedding if any(tensor.name == "output.weight" for tensor in layout.tensors) else 0,
    }


def device_speed(path: Path) -> float:
    """Bytes a second that the disk gives, by reading the file cold in large pieces."""
    make_cold(path)
    started = time.perf_counter()
    make_warm(path)
    return path.stat().st_size / (time.perf_counter() - started)


def surroundings(path: Path) -> Facts:
    """What the figures depend on."""
    device = os.stat(path).st_dev
    ahead = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "kernel": platform.release().split("-")[0],
        "processor": models[0].split(":")[1].strip() if models else platform.machine(),
        "n_cpus": os.cpu_count(),
        "load": os.getloadavg()[1],
        "memory": machine("MemTotal"),
        "read_ahead": int(ahead.read_text()) << 10 if ahead.exists() else None,
        "device_speed": device_speed(path),
    }


def experiment(path: Path, shared: Path, runs: int, log: Any = sys.stderr) -> Facts:
    """All of it, in figures."""

    def told(what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {what}", file=log, flush=True)

    told("the disk")
    found: Facts = {"model": facts_of(path), "shared": facts_of(shared), "machine": surroundings(path), "runs": runs}
    told("start")
    found["start"] = start(path, runs)
    told("processes")
    most_read = min(N_PROCESSES, int(SPARE * machine("MemAvailable") / shared.stat().st_size) - 1)
    found["processes"] = {
        "map": processes(shared, "map", N_PROCESSES),
        "read": processes(shared, "read", most_read) if most_read > 0 else [],
    }
    told("cap")
    (mapped,) = (way for way in found["start"] if (way["by"], way["state"]) == ("map", "warm"))
    found["caps"] = caps(path, int(mapped["rss_anon"]))
    told("alignment")
    found["alignments"] = alignments(path, runs)
    told("done")
    return found


def make_models(folder: Path) -> tuple[Path, Path]:
    """A seeded model of TinyLlama's shape, Q4_0 and BF16."""
    from convert import make_checkpoint

    meta, small, large = folder / "mapping-meta", folder / "mapping-q4_0.gguf", folder / "mapping-bf16.gguf"
    try:
        make_checkpoint(meta, "tinyllama")
        llamatools.convert(meta, large)
        llamatools.quantize(large, small, "q4_0")
    finally:
        shutil.rmtree(meta, ignore_errors=True)
    return small, large


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL|FOLDER")
    parser.add_argument("--shared", type=Path, help="the file that the processes share; MODEL by default")
    parser.add_argument("--page", type=Path, metavar="FOLDER")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--from", type=Path, dest="results", metavar="JSON", help="write the page of these figures")
    arguments = parser.parse_args()
    if arguments.results is not None:
        found = json.loads(arguments.results.read_text())
    elif arguments.model is None:
        parser.error("name a model, or a folder to make one in")
    elif arguments.model.is_dir():
        made: tuple[Path, ...] = ()
        try:
            made = make_models(arguments.model)
            found = experiment(*made, arguments.runs)
        finally:
            for path in made:
                path.unlink()
    else:
        found = experiment(arguments.model, arguments.shared or arguments.model, arguments.runs)
    if arguments.page is not None:
        write_page(found, arguments.page)
    else:
        json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
