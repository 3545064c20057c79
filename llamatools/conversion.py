"""From a checkpoint to an aligned GGUF file: plan, fill, publish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from .checkpoint import Note
from .draft import Draft, check_destination
from .dtypes import BF16, F16, F32, DType
from .errors import UnsupportedError, UsageError, in_file
from .fill import Losses, default_threads, fill, working_memory
from .formats.gguf_write import DEFAULT_ALIGNMENT
from .formats.meta import DEFAULTS, MetaOptions, is_meta_folder, open_meta, verify_source
from .layout import Layout
from .plan import plan_gguf

DTYPES: dict[str, DType | None] = {"auto": None, "f32": F32, "f16": F16, "bf16": BF16}

OnProgress = Callable[[int, int], object]  # bytes done, bytes in all


@dataclass(frozen=True)
class Conversion:
    """What `convert` did, or with dry_run would do.

    layout: the written file's. memory: bytes of buffers at most. losses: by tensor, only where a cast lost something.
    verified: what --verify-source checked. seconds: of work.
    """

    layout: Layout
    threads: int
    memory: int
    written: bool
    seconds: float
    losses: Mapping[str, Losses] = field(default_factory=dict)
    verified: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[Note, ...]:
        """What the files did not say."""
        return self.layout.notes


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    alignment: int = DEFAULT_ALIGNMENT,
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    options: MetaOptions = DEFAULTS,
    name: str | None = None,
    settings: Mapping[str, str] | None = None,
    verify: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> Conversion:
    """Converts the Meta checkpoint in folder `source` to the GGUF file `destination`.

    dtype: of the matrices; "auto" keeps each one's own. alignment: of every tensor in bytes, a power of two from 32 to
    2 MiB. threads: as many as there are processors by default; the bytes do not depend on it. dry_run: plan only.
    force: replace an existing file. options: what to state about the checkpoint. name: general.name.
    settings: metadata keys to set, as text. verify: read the source whole first and compare its checksums.

    Raises FormatError for bad input, UsageError for a request that cannot be met, UnsupportedError for other models,
    SpaceError for a full disk. Whatever happens, no incomplete file is left.
    """
    started = time.perf_counter()
    source, destination = Path(source), Path(destination)
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", where="--dtype", todo=f"One of {', '.join(DTYPES)}")
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot do the work", where="--threads")
    threads = threads or default_threads()
    with in_file(source):
        if not is_meta_folder(source):
            source.stat()
            raise UnsupportedError(
                "not a Meta checkpoint's folder: neither params.json nor consolidated.00.pth is in it",
                todo="Name the folder that holds them",
            )
    checkpoint = open_meta(source, options)
    with in_file(source):
        plan = plan_gguf(
            checkpoint, destination, dtype=DTYPES[dtype], alignment=alignment, name=name, settings=settings
        )
    layout = plan.layout
    memory = working_memory(layout.tensors, threads)
    if not dry_run:
        check_destination(destination, [file.path for file in checkpoint.files], force=force)
    verified = verify_source(source) if verify else []
    if dry_run:
        return Conversion(layout, threads, memory, False, time.perf_counter() - started, verified=tuple(verified))

    with Draft(destination, layout.size, force=force) as draft:
        progress = _Total(sum(tensor.nbytes for tensor in layout.tensors), on_progress)
        filled = fill(draft, layout.tensors, threads=threads, progress=progress)
        header = plan.header(filled.digests, filled.source_digests)
        draft.write(header[4:], 4)
        draft.write(header[:4], 0)  # the magic last: until now no reader takes the file for a model
        draft.publish()
    seconds = time.perf_counter() - started
    return Conversion(layout, threads, memory, True, seconds, filled.losses, tuple(verified))


class _Total:
    """Adds up what the threads did, for whoever watches."""

    def __init__(self, total: int, on_progress: OnProgress) -> None:
        self._done, self._total, self._on_progress, self._lock = 0, total, on_progress, Lock()

    def __call__(self, n: int) -> None:
        with self._lock:
            self._done += n
            self._on_progress(self._done, self._total)
