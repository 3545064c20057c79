"""Every byte of a model file accounted for: what lies where, from its first byte to its last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from ..layout import Layout, PlacedTensor

Kind = Literal["header", "tensor", "padding", "hole", "overlap", "records", "trailing", "missing", "unread"]

# What the bytes are, for people. The order is that of a legend.
MEANINGS: dict[Kind, str] = {
    "header": "header",
    "tensor": "weights",
    "records": "the format's own records between tensors",
    "padding": "padding up to the alignment",
    "hole": "bytes that belong to nothing",
    "overlap": "bytes that two tensors claim",
    "trailing": "bytes behind the last tensor",
    "missing": "bytes that tensors claim behind the file's end",
    "unread": "not understood",
}
FAULTS: frozenset[Kind] = frozenset({"hole", "overlap", "missing"})  # shown however small


@dataclass(frozen=True)
class Extent:
    """Bytes start to stop of one file. tensor: whose they are, for weights; the later of two, for an overlap."""

    start: int
    stop: int
    kind: Kind
    tensor: PlacedTensor | None = None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def extents(layout: Layout, file: int) -> list[Extent]:
    """What lies in a file (an index into the layout's files), in order, without gaps.

    It ends at the file's end, or behind it where tensors claim bytes that are missing, at twice its size at most.
    """
    size = layout.files[file].size
    if layout.stopped_at is not None:  # then it is not known where tensors lie
        read = min(layout.stopped_at, size)
        parts = [Extent(0, read, "header"), Extent(read, size, "unread")]
    else:
        tensors = [tensor for tensor in layout.tensors if tensor.file == file and tensor.nbytes]
        parts = list(_parts(layout, tensors, size))
    return _joined(part for part in parts if part.nbytes > 0)


def _parts(layout: Layout, tensors: Sequence[PlacedTensor], size: int) -> Iterator[Extent]:
    """Weights, and what lies before, between and behind them. Some are empty."""
    at = 0
    for part in _claimed(tensors):
        if part.start > at:
            yield from _within(_gap(layout, at, part.start), size)
        yield from _within([part], size)
        at = part.stop
    if at < size:
        for part in _gap(layout, at, size):
            yield replace(part, kind="trailing") if part.kind == "hole" and tensors else part


def _claimed(tensors: Sequence[PlacedTensor]) -> Iterator[Extent]:
    """The bytes of tensors, cut at every tensor's begin and end."""
    edges: dict[int, list[tuple[int, int]]] = {}  # byte -> (1 for a begin or -1 for an end, the tensor's number)
    for n, tensor in enumerate(tensors):
        edges.setdefault(tensor.offset, []).append((1, n))
        edges.setdefault(tensor.end, []).append((-1, n))
    n_open = numbers = latest = 0  # of the tensors that have begun and not ended: count, sum of numbers
    for start, stop in pairwise(sorted(edges)):
        for step, n in edges[start]:
            n_open, numbers = n_open + step, numbers + step * n
            latest = n if step > 0 else latest
        if n_open == 1:  # the sum is the number of the only one
            yield Extent(start, stop, "tensor", tensors[numbers])
        elif n_open:
            yield Extent(start, stop, "overlap", tensors[latest])


def _gap(layout: Layout, start: int, stop: int) -> list[Extent]:
    """Bytes that are no tensor's. A file begins with its header, after which comes padding where its end is known."""
    if start == 0:
        end = stop if layout.header_end is None else min(layout.header_end, stop)
        return [Extent(0, end, "header"), *(_gap(layout, end, stop) if 0 < end < stop else [])]
    if not (layout.format.startswith("GGUF") or layout.format in ("safetensors", "Hugging Face")):
        return [Extent(start, stop, "records")]  # in zip files and ggml's, every tensor has one
    alignment = layout.alignment or 1
    padded = min(-(-start // alignment) * alignment, stop)
    return [Extent(start, padded, "padding"), Extent(padded, stop, "hole")]


def _within(parts: Sequence[Extent], size: int) -> Iterator[Extent]:
    """The parts, with what lies behind the file's end as missing."""
    for part in parts:
        yield replace(part, stop=min(part.stop, size))
        if part.stop > size:
            yield Extent(max(part.start, size), min(part.stop, 2 * size), "missing", part.tensor)


def _joined(parts: Iterator[Extent]) -> list[Extent]:
    """Neighbours of the same kind and tensor as one."""
    joined: list[Extent] = []
    for part in parts:
        if joined and joined[-1].kind == part.kind and joined[-1].tensor is part.tensor:
            joined[-1] = replace(joined[-1], stop=part.stop)
        else:
            joined.append(part)
    return joined
