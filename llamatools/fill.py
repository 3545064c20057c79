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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .draft import Draft, Drafts
from .dtypes import BF16, F16, Blocks, DType, Floats, Weights
from .dtypes.kernels import sum_of_squares
from .dtypes.rounding import SAFE_SQUARE, Rounding
from .errors import FormatError
from .layout import PlacedTensor
from .provenance import source_name
from .tensors import Cast, FileTensor, LazyTensor, Witness

CHUNK = 256 << 10  # bytes of output done at once: read, hashed and written while they are in the processor's cache
FLOATS_CHUNK = 4 << 20  # the same where weights are quantized, in bytes of float32; fewer steps of Python count more

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
    """What filling found out: SHA-256 by output tensor and by source tensor; losses by output tensor, where any.

    roundings: of the tensors that were quantized, where that was to be measured.
    """

    digests: dict[str, str] = field(default_factory=dict)
    source_digests: dict[str, str] = field(default_factory=dict)
    losses: dict[str, Losses] = field(default_factory=dict)
    roundings: dict[str, Rounding] = field(default_factory=dict)


@dataclass(frozen=True)
class Care:
    """What else to find out while filling, each at a price.

    sources: digests of what was read. numbers: refuse weights that are no finite numbers, and blocks that would hold
    some. roundings: how far quantized weights are from what they were, which includes `numbers`.
    """

    sources: bool = True
    numbers: bool = False
    roundings: bool = False


def default_threads() -> int:
    """As many threads as there are processors for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def working_memory(tensors: Sequence[PlacedTensor], threads: int) -> int:
    """About how many bytes of buffers filling needs at most."""

    def per_task(tensor: PlacedTensor) -> int:
        if tensor.source is None:
            return 0
        # The bytes read, decoded to float32, encoded and, for a cast, checked once more.
        return 4 * rows_at_once(tensor.source) * max(tensor.source.row_nbytes, 4 * tensor.source.row_length)

    return threads * max(map(per_task, tensors), default=0)


def rows_at_once(source: LazyTensor) -> int:
    """How many rows are done before the next are read."""
    if source.dtype.is_quantized and isinstance(source, Cast):
        return max(1, FLOATS_CHUNK // max(4 * source.row_length, 1))
    return max(1, CHUNK // max(source.row_nbytes, 1))


def fill(
    drafts: Drafts, tensors: Sequence[PlacedTensor], *, threads: int, progress: Progress, care: Care = Care()
) -> Filled:
    """Writes every tensor into the draft of its file. The result does not depend on `threads`.

    Raises what reading and writing raise, and FormatError for what `care` finds; the first error stops all threads.
    """
    stop = Event()
    filled = Filled()
    with ThreadPoolExecutor(threads) as pool:
        try:
            most_work_first = sorted(tensors, key=lambda tensor: -tensor.n_weights)
            tasks = [
                pool.submit(_fill_tensor, drafts[tensor.file], tensor, filled, stop, progress, care)
                for tensor in most_work_first
            ]
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return filled


class _StoppedError(Exception):
    """Another thread failed, or the user interrupted."""


def _fill_tensor(
    draft: Draft, tensor: PlacedTensor, filled: Filled, stop: Event, progress: Progress, care: Care
) -> None:
    source = tensor.source
    assert source is not None, "a planned tensor has a source"
    is_copy = isinstance(source, FileTensor)  # whose digest is its source's
    witness = _Ledger(tensor.name, care, hash_reads=care.sources or is_copy)
    digest = None if is_copy else hashlib.sha256()
    step = rows_at_once(source)
    offset = tensor.offset
    for start in range(0, source.n_rows, step):
        if stop.is_set():
            raise _StoppedError
        blocks = source.read(start, min(start + step, source.n_rows), witness)
        if care.numbers and not isinstance(source, Cast):
            witness.copied(blocks, source.dtype, start)
        data = blocks.reshape(-1).view(np.uint8).data
        if digest:
            digest.update(data)
        draft.write(data, offset)
        offset += len(data)
        progress(len(data))
    for leaf, sha256 in witness.digests.items():
        if care.sources:
            filled.source_digests[source_name(leaf)] = sha256.hexdigest()
        if digest is None:
            filled.digests[tensor.name] = sha256.hexdigest()
    if digest:
        filled.digests[tensor.name] = digest.hexdigest()
    if witness.losses:
        filled.losses[tensor.name] = witness.losses
    if witness.rounding.n_weights:
        filled.roundings[tensor.name] = witness.rounding


class _Ledger(Witness):
    """Keeps the digests of what was read for one tensor, and what its casts did to the weights."""

    def __init__(self, name: str, care: Care, hash_reads: bool) -> None:
        self.name, self._care, self._hash_reads = name, care, hash_reads
        self.digests: dict[FileTensor, hashlib._Hash] = {}
        self.losses = Losses()
        self.rounding = Rounding()

    def read(self, tensor: FileTensor, blocks: Blocks) -> None:
        if self._hash_reads:
            self.digests.setdefault(tensor, hashlib.sha256()).update(blocks.reshape(-1).view(np.uint8).data)

    def encoded(self, weights: Weights, blocks: Blocks, dtype: DType, start: int) -> None:
        if dtype in (F16, BF16) and dtype.decode:
            kept = dtype.decode(blocks)
            self.losses.overflows += int(np.count_nonzero(np.isinf(kept) & np.isfinite(weights)))
            self.losses.flushes += int(np.count_nonzero((kept == 0) & (weights != 0)))
        if not self._care.numbers:
            return
        if dtype.is_quantized and self._care.roundings:
            squares = self.rounding.add(weights, blocks, dtype, start)
        else:
            squares = sum_of_squares(weights)
        if not squares <= SAFE_SQUARE:
            values = _floats(weights)
            self._require_numbers(values, start)
            if dtype.is_quantized and dtype.decode:
                self._require_room(values, dtype.decode(blocks), dtype, start)

    def copied(self, blocks: Blocks, dtype: DType, start: int) -> None:
        """`blocks`, the first of row `start`, are stored as they were read."""
        if dtype.decode is not None:
            values = dtype.decode(blocks)
            if not sum_of_squares(values) <= SAFE_SQUARE:
                self._require_numbers(values, start)

    def _require_numbers(self, values: Floats, start: int) -> None:
        if (place := _first(~np.isfinite(values), start)) is not None:
            row, column = place
            raise FormatError(
                f"row {row}, column {column} is {values[row - start, column]}, which is no number",
                where=f"tensor {self.name!r}",
                todo="The file is damaged, or its training went wrong",
            )

    def _require_room(self, values: Floats, decoded: Floats, dtype: DType, start: int) -> None:
        if (place := _first(~np.isfinite(decoded), start)) is not None:
            row, column = place
            raise FormatError(
                f"the weights around row {row}, column {column}, which is {values[row - start, column]:g}, are too "
                f"large for {dtype}, whose scales end at 65504",
                where=f"tensor {self.name!r}",
                todo="Give it BF16 or F32",
            )


def _floats(weights: Weights) -> Floats:
    return BF16.decode(weights) if weights.dtype == BF16.block and BF16.decode else weights


def _first(found: NDArray[Any], start: int) -> tuple[int, int] | None:
    """Row and column of the first true in (rows, columns), the first of them row `start`."""
    places = np.flatnonzero(found)
    if not len(places):
        return None
    row, column = divmod(int(places[0]), found.shape[1])
    return start + row, column
