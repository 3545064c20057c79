"""`llamatools run --memory-report`: what running a model takes of memory and of the disk, measured while it runs.

The process is looked at four times: before the file is opened, when the model is mapped, and after its first and its
tenth token. What looking costs is in none of the times.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamatools import inspect
from llamatools.check.memory import Need, needs
from llamatools.check.residency import PAGE, Residency, residency
from llamatools.formats.gguf_split import SHARD, shard_name
from llamatools.layout import Layout, PlacedTensor
from llamatools.memory_views import part
from llamatools.views import Table, human_bytes

from .counters import MEANINGS, Counters, counters
from .running import RunReport, run

SCHEMA = "llamatools.memory/1"
WIDTH = 80
STAGES = {-1: "before", 0: "mapped", 1: "token 1", 10: "token 10"}  # by the number of tokens so far
SINCE_BEFORE = ("page_cache", "device_read", "minor_faults", "major_faults")  # shown against the first look


@dataclass(frozen=True)
class Look:
    """The process and the model's files at one moment. resident: by file, its pages in the page cache."""

    counters: Counters
    resident: dict[Path, Residency]

    @property
    def cached(self) -> int:
        """Bytes of the model's files in the page cache, in whole pages."""
        return sum(int((found.stops - found.starts).sum()) for found in self.resident.values())

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return {**asdict(self.counters), "model_in_page_cache": self.cached}


class Watch:
    """Looks at the process at the stages of a run, and keeps the time between."""

    def __init__(self, path: Path) -> None:
        self.files = files_of(path)
        self.looks: dict[str, Look] = {}
        self.seconds: list[float] = []  # until the model was mapped, then of each token
        self._look(STAGES[-1])
        self._resumed = time.perf_counter()

    def __call__(self, n_tokens: int) -> None:
        """To be called when the model is mapped, with 0, and after each token, with their number so far."""
        self.seconds.append(time.perf_counter() - self._resumed)
        if n_tokens in STAGES:
            self._look(STAGES[n_tokens])
        self._resumed = time.perf_counter()

    def _look(self, stage: str) -> None:
        found = counters(self.files)  # first, since looking on takes memory itself
        self.looks[stage] = Look(found, {file: residency(file) for file in self.files})


@dataclass(frozen=True)
class Kind:
    """All tensors of one kind, such as every layer's attn_q. resident: by stage, bytes of their pages in the cache."""

    name: str
    n_tensors: int
    nbytes: int
    page_nbytes: int
    resident: dict[str, int]


def kinds(layout: Layout, looks: Mapping[str, Look]) -> list[Kind]:
    """The tensors by kind, in the file's order. looks: by stage."""
    groups: dict[str, list[PlacedTensor]] = {}
    for tensor in layout.tensors:
        groups.setdefault(kind_of(tensor.name), []).append(tensor)
    found = []
    for name, tensors in groups.items():
        pages = {stage: [_pages(layout, look, tensor) for tensor in tensors] for stage, look in looks.items()}
        resident = {stage: PAGE * sum(n for _, n in of_stage) for stage, of_stage in pages.items()}
        page_nbytes = PAGE * sum(n for n, _ in pages[STAGES[-1]])
        found.append(Kind(name, len(tensors), sum(t.nbytes for t in tensors), page_nbytes, resident))
    return found


def _pages(layout: Layout, look: Look, tensor: PlacedTensor) -> tuple[int, int]:
    return look.resident[layout.files[tensor.file].path].pages(tensor)


@dataclass(frozen=True)
class MemoryReport:
    """What was measured, and beside it what `inspect --memory` estimates.

    map_seconds: until the model was ready. first_seconds: from then to the first token. steady_seconds: of each token
    after it, in the mean. The last two are None where the text ended before.
    """

    run: RunReport
    layout: Layout
    looks: dict[str, Look]
    map_seconds: float
    first_seconds: float | None
    steady_seconds: float | None
    estimate: list[Need]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes, seconds, counts; by stage what was counted, by tensor the part in the page cache."""
        stages = {stage: look.as_dict() for stage, look in self.looks.items()}
        tensors = [
            {"name": tensor.name, "pages": _pages(self.layout, self.looks[STAGES[-1]], tensor)[0]}
            | {"resident": {stage: _pages(self.layout, look, tensor)[1] for stage, look in self.looks.items()}}
            for tensor in self.layout.tensors
        ]
        memory = {
            "schema": SCHEMA,
            "page": PAGE,
            "seconds": {"map": self.map_seconds, "first_token": self.first_seconds, "steady": self.steady_seconds},
            "stages": stages,
            "meanings": MEANINGS,
            "kinds": [asdict(kind) for kind in kinds(self.layout, self.looks)],
            "tensors": tensors,
            "estimate": {need.name: need.nbytes for need in self.estimate},
        }
        return {**self.run.as_dict(), "memory": memory}

    def lines(self) -> Iterator[str]:
        """For people, within 80 columns."""
        yield from self._time_lines()
        yield from self._counter_lines()
        yield from self._tensor_lines()
        yield from self._estimate_lines()

    def _time_lines(self) -> Iterator[str]:
        after = max(self.run.timing.n_generated - 1, 0)
        yield "TIME, in seconds"
        for name, seconds, meaning in (
            ("map", self.map_seconds, "until the model is ready; reads its header, no weights"),
            ("first token", self.first_seconds, f"reading the prompt of {self.run.timing.n_prompt}; loading kernels"),
            ("steady token", self.steady_seconds, f"each after it, the mean of {after}"),
        ):
            yield f"  {name:<13}{'-' if seconds is None else f'{seconds:.4f}':>8}   {meaning}"

    def _counter_lines(self) -> Iterator[str]:
        yield ""
        yield f"{'MEMORY AND DISK':<24}" + "".join(f"{stage:>14}" for stage in self.looks)
        first = self.looks[STAGES[-1]].counters
        for name, label in LABELS.items():
            base = getattr(first, name) if name in SINCE_BEFORE else 0
            values = [getattr(look.counters, name) - base for look in self.looks.values()]
            shown = values if name.endswith("faults") else map(_signed_bytes, values)
            yield f"  {label:<22}" + "".join(f"{value:>14}" for value in shown)
            yield from _wrapped(MEANINGS[name] + (". Since before" if name in SINCE_BEFORE else ""))
        yield f"  {'model in page cache':<22}" + "".join(
            f"{human_bytes(look.cached):>14}" for look in self.looks.values()
        )
        yield from _wrapped("pages of the model's files that are in memory (mincore), whoever brought them there")

    def _tensor_lines(self) -> Iterator[str]:
        yield ""
        yield "TENSORS, and the part of their pages that is in the page cache"
        rows = [
            (
                kind.name,
                str(kind.n_tensors),
                human_bytes(kind.nbytes),
                *(part(nbytes, kind.page_nbytes) for nbytes in kind.resident.values()),
            )
            for kind in kinds(self.layout, self.looks)
        ]
        headings = ("kind", "n", "size", *self.looks)
        for line in Table(headings, rows, frozenset(range(1, len(headings)))).lines():
            yield f"  {line}"

    def _estimate_lines(self) -> Iterator[str]:
        last, mapped = list(self.looks.values())[-1].counters, self.looks[STAGES[0]].counters
        ours = [need for need in self.estimate if not need.is_shared and not need.name.startswith("llama.cpp")]
        yield ""
        yield "ESTIMATED by `inspect --memory`, and measured"
        private, grown = sum(need.nbytes for need in ours), last.rss_anon - mapped.rss_anon
        for name, estimate, measured, meaning in (
            ("weights", self.layout.size, last.mapped, "shared: the file; its pages here"),
            ("private", private, grown, "without kernels; growth of RssAnon"),
        ):
            yield f"  {name:<10}{human_bytes(estimate):>14}{_signed_bytes(measured):>14}   {meaning}"


LABELS = {
    "rss_anon": "private (RssAnon)",
    "rss_file": "mapped (RssFile)",
    "mapped": "of it the model",
    "pss": "fair share (Pss)",
    "page_cache": "page cache",
    "device_read": "read from the device",
    "minor_faults": "minor faults",
    "major_faults": "major faults",
}


def report_memory(
    path: Path | str,
    prompt: str = "",
    *,
    max_tokens: int = 256,
    on_text: Callable[[str], None] | None = None,
    **sampling: Any,
) -> MemoryReport:
    """Runs a model as `run` does, and watches it. sampling: as of `run`.

    Raises as `run`, and UnsupportedError where the system does not tell what is in memory: only Linux does, and which
    pages of a file it tells its owner and those who may write to it.
    """
    path = Path(path)
    watch = Watch(path)
    report = run(path, prompt, max_tokens=max_tokens, on_text=on_text, on_token=watch, **sampling)
    layout = inspect(path)
    assert layout.hparams is not None, "it has just been run"
    context = min(report.timing.n_prompt + max_tokens, layout.hparams.max_seq_len)
    map_seconds, *tokens = watch.seconds
    later = tokens[1:]
    return MemoryReport(
        report,
        layout,
        watch.looks,
        map_seconds,
        tokens[0] if tokens else None,
        sum(later) / len(later) if later else None,
        needs(layout, context),
    )


def files_of(path: Path) -> list[Path]:
    """The file, or all files of the set that its name says it belongs to, as far as they are there."""
    parts = SHARD.fullmatch(path.name)
    if not parts:
        return [path]
    count = int(parts[3])
    files = [path.with_name(shard_name(parts[1], n, count)) for n in range(count)]
    return [file for file in files if file == path or file.is_file()]


def kind_of(name: str) -> str:
    """What a tensor is, in any layer: blk.7.attn_q.weight is an attn_q."""
    parts = name.removesuffix(".weight").split(".")
    return parts[-1]


def _signed_bytes(n: int) -> str:
    return f"-{human_bytes(-n)}" if n < 0 else human_bytes(n)


def _wrapped(meaning: str) -> list[str]:
    return textwrap.wrap(meaning, WIDTH, initial_indent="      ", subsequent_indent="      ")
