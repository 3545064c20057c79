"""Filling a planned layout: each tensor's rows are read, transformed, hashed and written at their offset.

A tensor is one task, done in order of its rows, since a digest needs that order; tensors are done in parallel, largest
first. Memory is a few chunks per thread, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event

import numpy as np

from .draft import Draft
from .dtypes import BF16, F16, Blocks, DType, Floats
from .layout import PlacedTensor
from .provenance import source_name
from .tensors import FileTensor, Witness

CHUNK = 256 << 10  # bytes of output done at once: read, hashed and written while they are in the processor's cache

Progress = Callable[[int], object]  # is told how many bytes more are done


@dataclass
class Losses:
    """What a cast could not keep: finite weights that became infinite, weights that became zero."""

    overflows: int = 0
    flushes: int = 0

    def __bool__(self) -> bool:
        return bool(self.overflows or self.flushes)


@dataclass
class Filled:
    """What filling found out: SHA-256 by output tensor and by source tensor; losses by output tensor, where any."""

    digests: dict[str, str] = field(default_factory=dict)
    source_digests: dict[str, str] = field(default_factory=dict)
    losses: dict[str, Losses] = field(default_factory=dict)


def default_threads() -> int:
    """As many threads as there are processors for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def working_memory(tensors: Sequence[PlacedTensor], threads: int) -> int:
    """About how many bytes of buffers filling needs at most."""

    def per_task(tensor: PlacedTensor) -> int:
        row = tensor.nbytes // max(tensor.source.n_rows, 1) if tensor.source else 0
        # The bytes read, decoded to float32, encoded and, for a cast, checked once more.
        return 4 * 4 * max(CHUNK, row)

    return threads * max(map(per_task, tensors), default=0)


def fill(draft: Draft, tensors: Sequence[PlacedTensor], *, threads: int, progress: Progress) -> Filled:
    """Writes every tensor into `draft`. The result does not depend on `threads`.

    Raises what reading and writing raise; the first error stops all threads.
    """
    stop = Event()
    filled = Filled()
    with ThreadPoolExecutor(threads) as pool:
        try:
            largest_first = sorted(tensors, key=lambda tensor: -tensor.nbytes)
            tasks = [pool.submit(_fill_tensor, draft, tensor, filled, stop, progress) for tensor in largest_first]
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return filled


class _StoppedError(Exception):
    """Another thread failed, or the user interrupted."""


def _fill_tensor(draft: Draft, tensor: PlacedTensor, filled: Filled, stop: Event, progress: Progress) -> None:
    source = tensor.source
    assert source is not None, "a planned tensor has a source"
    witness = _Ledger()
    digest = None if isinstance(source, FileTensor) else hashlib.sha256()  # a plain copy's is its source's
    rows_at_once = max(1, CHUNK // max(source.row_nbytes, 1))
    offset = tensor.offset
    for start in range(0, source.n_rows, rows_at_once):
        if stop.is_set():
            raise _StoppedError
        blocks = source.read(start, min(start + rows_at_once, source.n_rows), witness)
        data = blocks.reshape(-1).view(np.uint8).data
        if digest:
            digest.update(data)
        draft.write(data, offset)
        offset += len(data)
        progress(len(data))
    for leaf, sha256 in witness.digests.items():
        filled.source_digests[source_name(leaf)] = sha256.hexdigest()
        if digest is None:
            filled.digests[tensor.name] = sha256.hexdigest()
    if digest:
        filled.digests[tensor.name] = digest.hexdigest()
    if witness.losses:
        filled.losses[tensor.name] = witness.losses


class _Ledger(Witness):
    """Keeps the digests of what was read for one tensor, and counts what its casts lost."""

    def __init__(self) -> None:
        self.digests: dict[FileTensor, hashlib._Hash] = {}
        self.losses = Losses()

    def read(self, tensor: FileTensor, blocks: Blocks) -> None:
        self.digests.setdefault(tensor, hashlib.sha256()).update(blocks.reshape(-1).view(np.uint8).data)

    def encoded(self, values: Floats, blocks: Blocks, dtype: DType) -> None:
        if dtype in (F16, BF16) and dtype.decode:
            kept = dtype.decode(blocks)
            self.losses.overflows += int(np.count_nonzero(np.isinf(kept) & np.isfinite(values)))
            self.losses.flushes += int(np.count_nonzero((kept == 0) & (values != 0)))
