"""Where the tensors of a GGUF file lie, and what is wrong with that.

One equation is held against the file: every tensor begins at the running sum of the padded sizes before it, and ends
inside the file. Sums are Python integers, which do not overflow. Where the equation fails for the stated alignment but
holds for another, the file was written by a tool that ignores `general.alignment`, and the tensors are placed where
they are. Otherwise each offset is believed, and what contradicts it is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType
from ..dtypes.eras import OF_64, nbytes_by_64
from ..errors import FormatError, LlamatoolsError, Report, UnsupportedError
from ..layout import PlacedTensor
from ..tensors import FileTensor, SourceFile
from .gguf_write import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAX_ALIGNMENT, padded

POWERS = [1 << n for n in range(MAX_ALIGNMENT.bit_length())]
# Faults that laying the file out anew mends, since its data are whole; unless `place` tells of "unplaced", too.
MENDABLE = frozenset({"alignment-value", "alignment-mismatch", "hole", "padding", "order"})
LAY_OUT_ANEW = "The data is whole: `llamatools convert` lays it out anew"
MAKE_ANEW = "Make or download the file again"

Peek = Callable[[int], NDArray[np.uint8]]  # the first n bytes behind the header's end, or fewer


@dataclass(frozen=True)
class Entry:
    """A tensor as the file states it. offset: from where the data begin.

    nbytes: what dtype and shape take; None where that is unknown.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int | None


def place(
    entries: Sequence[Entry],
    source: SourceFile,
    header_end: int,
    stated: int | None,
    peek: Peek,
    report: Report,
    *,
    is_in_doubt: bool = False,
) -> tuple[int, tuple[PlacedTensor, ...]]:
    """Where the data begin, and the tensors where they are. Tells `report` where they are not where they must be.

    stated: the file's `general.alignment`, None for none. is_in_doubt: it states one that cannot be.
    """
    sizes = _sizes(entries)
    alignment = DEFAULT_ALIGNMENT if stated is None else stated
    found = _alignment_in_use(entries, sizes, header_end, alignment, source.size, peek)
    data_offset = padded(header_end, found or alignment)
    proven = _proven_start(entries, sizes, header_end, found, source.size, peek)
    if proven is not None and found != alignment:
        data_offset = proven
    todo = LAY_OUT_ANEW if proven == data_offset else MAKE_ANEW
    if found is None and (name := _by_64(entries, sizes, alignment)):
        report(UnsupportedError(OF_64, where=f"tensor {name!r}", todo=MAKE_ANEW, code="dtype"))
    elif found is None:
        for error in _contradictions(entries, sizes, data_offset, alignment, todo):
            report(error)
    elif found != alignment:
        says = "is not stated, which means 32" if stated is None else f"says {stated}"
        report(
            FormatError(
                f"the tensors' offsets are the running sum for {found}, but {ALIGNMENT_KEY} {says}",
                where=f"key {ALIGNMENT_KEY!r}",
                todo=todo,
                code="alignment-mismatch",
            )
        )
    if proven != data_offset and (is_in_doubt or found != alignment):
        end = data_offset + _extent(entries, sizes)
        what = f"its tensors' data would be bytes {data_offset} to {end}, but the file ends at {source.size}: nothing "
        report(FormatError(f"{what}tells where they begin", todo=MAKE_ANEW, code="unplaced"))
    tensors = []
    for entry, nbytes in zip(entries, sizes, strict=True):
        offset = data_offset + entry.offset
        tensor = None if entry.nbytes is None else FileTensor(entry.name, entry.dtype, entry.shape, source, offset)
        tensors.append(PlacedTensor(entry.name, entry.dtype, entry.shape, offset, nbytes, source=tensor))
    return data_offset, tuple(tensors)


def require_data(tensors: Sequence[PlacedTensor], size: int, report: Report) -> None:
    """Every tensor must end inside the file; the padding behind the last one may be missing, as in llama.cpp."""
    cut = sorted((tensor for tensor in tensors if tensor.end > size), key=lambda tensor: tensor.offset)
    if cut:
        missing = sum(tensor.end - max(tensor.offset, size) for tensor in cut)
        report(
            FormatError(
                f"its data is bytes {cut[0].offset} to {cut[0].end}, but the file ends at {size}: "
                f"{missing} bytes of {len(cut)} {'tensor' if len(cut) == 1 else 'tensors'} are missing",
                where=f"tensor {cut[0].name!r}",
                todo="The file is probably truncated",
                code="truncated",
                span=(size, max(tensor.end for tensor in cut)),
            )
        )


def _sizes(entries: Sequence[Entry]) -> list[int]:
    """Bytes of each tensor; where the dtype does not tell, up to where the next one begins."""
    sizes = [entry.nbytes or 0 for entry in entries]
    for n, (entry, after) in enumerate(pairwise(entries)):
        if entry.nbytes is None:
            sizes[n] = max(after.offset - entry.offset, 0)
    return sizes


def _running_sum(entries: Sequence[Entry], sizes: Sequence[int], alignment: int) -> int | None:
    """The padded sizes of all tensors together; None where an offset is not the sum of those before it."""
    total = 0
    for entry, nbytes in zip(entries, sizes, strict=True):
        if entry.offset != total:
            return None
        total += padded(nbytes, alignment)
    return total


def _by_64(entries: Sequence[Entry], sizes: Sequence[int], alignment: int) -> str | None:
    """The first tensor in super-blocks of 64, if those explain the offsets."""
    small = [nbytes_by_64(entry.dtype, math.prod(entry.shape)) for entry in entries]
    if _running_sum(entries, [n or size for n, size in zip(small, sizes, strict=True)], alignment) is None:
        return None
    return next((entry.name for entry, n in zip(entries, small, strict=True) if n), None)


def _alignment_in_use(
    entries: Sequence[Entry], sizes: Sequence[int], header_end: int, stated: int, size: int, peek: Peek
) -> int | None:
    """The alignment that the file is laid out for: the stated one, or one that explains the offsets. None for neither.

    Where tensors' sizes are multiples of several, offsets fit them all, but where the data begin differs, and with it
    where the file ends. So the file's size decides, if zeros lie before the data and something else where they begin.
    """
    total = _running_sum(entries, sizes, stated)
    if total is not None and (not entries or size <= header_end):  # a file that is only a header tells no more
        return stated

    def is_whole(alignment: int, total: int) -> bool:
        start = padded(header_end, alignment)
        unpadded_end = start + total - padded(sizes[-1], alignment) + sizes[-1]
        if size not in (start + total, unpadded_end) or peek(start - header_end).any():
            return False
        to_stated = peek(padded(header_end, stated) - header_end)[start - header_end :]
        return not len(to_stated) or bool(to_stated.any())

    if total is not None and is_whole(stated, total):
        return stated
    totals = {power: sum_ for power in POWERS if (sum_ := _running_sum(entries, sizes, power)) is not None}
    whole = [power for power, sum_ in totals.items() if is_whole(power, sum_)]
    if total is not None:
        elsewhere = [power for power in whole if padded(header_end, power) != padded(header_end, stated)]
        return _likeliest(elsewhere) if elsewhere else stated
    return _likeliest(whole or list(totals)) if totals else None


def _proven_start(
    entries: Sequence[Entry], sizes: Sequence[int], header_end: int, found: int | None, size: int, peek: Peek
) -> int | None:
    """Where the data must begin in a file that does not lay them out as it says; None where nothing tells.

    It is a multiple of a power of two behind the header and zeros, such that the last tensor, padded to that or not,
    ends with the file. No two places can do that: they lie further apart than there is padding.
    found: the alignment that explains the offsets, None for none.
    """
    extent = _extent(entries, sizes)
    for power in POWERS:
        start = padded(header_end, power)
        fits = found is None or _running_sum(entries, sizes, power) is not None
        if fits and size in (start + extent, start + padded(extent, power)) and not peek(start - header_end).any():
            return start
    return None


def _extent(entries: Sequence[Entry], sizes: Sequence[int]) -> int:
    """Bytes from where the data begin to where the last tensor ends."""
    return max((entry.offset + nbytes for entry, nbytes in zip(entries, sizes, strict=True)), default=0)


def _likeliest(powers: Sequence[int]) -> int:
    """What tools use that know of no other, or the largest."""
    return DEFAULT_ALIGNMENT if DEFAULT_ALIGNMENT in powers else powers[-1]


def _contradictions(
    entries: Sequence[Entry], sizes: Sequence[int], data_offset: int, alignment: int, todo: str
) -> Iterator[LlamatoolsError]:
    """What keeps the offsets from being the running sum for any alignment, in the order of bytes.

    todo: what to do about those that leave the data whole.
    """
    in_order = sorted(zip(entries, sizes, strict=True), key=lambda item: (item[0].offset, item[1]))
    end, before = data_offset, "the header"
    any_ = False
    for entry, nbytes in in_order:
        start, wanted = data_offset + entry.offset, padded(end, alignment)
        if start != wanted:
            any_ = True
            yield _contradiction(entry.name, start, before, end, wanted, alignment, todo)
        if start + nbytes >= end:
            end, before = start + nbytes, f"tensor {entry.name!r}"
    if not any_:
        expected = data_offset
        for entry, nbytes in zip(entries, sizes, strict=True):
            if data_offset + entry.offset != expected:
                yield FormatError(
                    f"its data begin at byte {data_offset + entry.offset}, but the tensors listed before it end at "
                    f"{expected}: they do not lie in the order of the list",
                    where=f"tensor {entry.name!r}",
                    todo=todo,
                    code="order",
                )
                return
            expected += padded(nbytes, alignment)


def _contradiction(
    name: str, start: int, before: str, end: int, wanted: int, alignment: int, todo: str
) -> LlamatoolsError:
    """A tensor's data begin at byte `start`, where they should at `wanted`, since what is `before` it ends at `end`."""
    begins = f"its data begin at byte {start}, but {before} ends at {end}"
    where = f"tensor {name!r}"
    if start < end:
        what = f"{begins}: they overlap by {end - start} bytes"
        return FormatError(what, where=where, todo="The file is damaged", code="overlap", span=(start, end))
    what = f"{begins}, which padded to {alignment} is {wanted}"
    if start < wanted:
        return FormatError(what, where=where, todo=todo, code="padding", span=(end, start))
    what += f": a hole of {start - wanted} bytes"
    return FormatError(what, where=where, todo=todo, code="hole", span=(wanted, start))
