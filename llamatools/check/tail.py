"""Zeros where the last tensors' data should be: a file whose space was set aside, but never filled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from ..errors import in_file
from ..layout import Layout, PlacedTensor
from .finding import Finding

SAMPLE = 4096  # bytes read at a place to tell whether it is zero


def check(layout: Layout) -> Iterator[Finding]:
    """Reads some samples of each file, from its end backwards."""
    if layout.stopped_at is not None:
        return  # where tensors lie is not known
    for n, file in enumerate(layout.files):
        tensors = sorted(
            (t for t in layout.tensors if t.file == n and t.nbytes and not t.strides), key=lambda t: t.offset
        )
        if not tensors:
            continue
        with in_file(file.path), open(file.path, "rb") as opened:
            end = min(tensors[-1].end, file.size)
            start = _zeros_from(opened.fileno(), tensors, end)
        if end - start < SAMPLE:
            continue
        empty = [tensor for tensor in tensors if tensor.offset >= start]
        if any(len(tensor.shape) > 1 for tensor in empty):
            yield Finding(
                "zero-tail",
                f"bytes {start} to {end} are zeros, and with them all of {len(empty)} "
                f"tensor{'s' if len(empty) > 1 else ''}, as an interrupted write leaves them",
                str(file.path),
                f"tensor {empty[0].name!r}",
                (start, end),
                "Copy or download it again",
            )
        else:
            what = f"the last {end - start} bytes of the file's data are zeros: rows that nothing uses, or a write"
            yield Finding(
                "zero-end", f"{what} that was interrupted", str(file.path), f"tensor {tensors[-1].name!r}", (start, end)
            )


def _zeros_from(fd: int, tensors: Sequence[PlacedTensor], end: int) -> int:
    """The byte from which on there are only zeros up to `end`, as far as samples tell."""
    zero = end  # from here on, zeros
    for tensor in reversed(tensors):
        if tensor.offset >= zero:
            continue
        if not _is_zero(fd, max(zero - SAMPLE, tensor.offset), zero):
            return _first_zero(fd, max(zero - SAMPLE, tensor.offset), zero)
        if not _is_zero(fd, tensor.offset, min(tensor.offset + SAMPLE, zero)):
            low = tensor.offset  # something is here, and zeros are from `zero - SAMPLE` on
            high = max(zero - SAMPLE, low)
            while high - low > SAMPLE:
                middle = (low + high) // 2
                low, high = (low, middle) if _is_zero(fd, middle, middle + SAMPLE) else (middle, high)
            return _first_zero(fd, low, min(high + SAMPLE, zero))
        zero = tensor.offset
    return zero


def _is_zero(fd: int, start: int, stop: int) -> bool:
    return not os.pread(fd, stop - start, start).strip(b"\0")


def _first_zero(fd: int, start: int, stop: int) -> int:
    """Where the zeros before `stop` begin."""
    return start + len(os.pread(fd, stop - start, start).rstrip(b"\0"))
