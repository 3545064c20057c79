"""Why a tensor is not what its source makes of it: the mistakes that conversions make, each recomputed and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b

import numpy as np

from ..dtypes import Blocks
from ..tensors import NO_WITNESS, Concat, LazyTensor, Witness
from .hub import HeadRows, is_rotated, row_ranges, same_bytes

Make = Callable[[str, LazyTensor], Iterable[LazyTensor]]  # what a tensor of the source may become, in the file's dtype


class Reshaped(LazyTensor):
    """The same weights, row after row, as another shape; of dtypes without blocks."""

    def __init__(self, tensor: LazyTensor, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape, self.parts = tensor.name, tensor.dtype, shape, (tensor,)

    def read(self, start: int, stop: int, witness: Witness = NO_WITNESS) -> Blocks:
        inner, width = self.parts[0].row_length, self.row_length
        low, high = start * width, stop * width  # weights
        rows = self.parts[0].read(low // inner, -(-high // inner), witness)
        skipped = low // inner * inner
        return np.ascontiguousarray(rows.reshape(-1)[low - skipped : high - skipped].reshape(stop - start, width))


def reason(
    name: str, tensor: LazyTensor, source: Mapping[str, LazyTensor], make: Make, head_dim: int | None
) -> str | None:
    """What `tensor`, which differs from what source[name] becomes, holds instead; None where that is not known.

    make: gives what a tensor becomes. head_dim: rows per head.
    """
    own = source[name]
    if head_dim and is_rotated(name) and own.n_rows % head_dim == 0:
        for made in make(name, own):
            if same_bytes(tensor, HeadRows(made, head_dim, to_meta=False)):
                return "its rows are in Hugging Face's order, where Meta's is due"
            if same_bytes(tensor, HeadRows(made, head_dim, to_meta=True)):
                return "its rows were reordered from Hugging Face's order, though they were in Meta's"
    for other, candidate in source.items():
        is_like = other != name and candidate.shape == own.shape
        if is_like and any(same_bytes(tensor, made) for made in make(other, candidate)):
            return f"it holds what {other!r} should"
    if isinstance(own, Concat) and len(own.shape) == 2:
        joined = wrongly_joined(own)
        if any(same_bytes(tensor, made) for made in make(name, Reshaped(joined, own.shape))):
            return f"its {len(own.parts)} shards were joined by {_axis(joined)}, where they are parts of {_axis(own)}"
    return next(filter(None, (moved_rows(tensor, made) for made in make(name, own))), None)


def wrongly_joined(own: Concat) -> Concat:
    """The shards joined along the other axis."""
    return Concat(own.name, own.parts, axis=-1 if own.axis == 0 else 0)


def _axis(joined: Concat) -> str:
    return "rows" if joined.axis == 0 else "columns"


def moved_rows(tensor: LazyTensor, made: LazyTensor) -> str | None:
    """How rows of `made` stand in other places in `tensor`."""
    places: dict[bytes, int] = {}
    due: list[bytes] = []
    for digest in _rows(made):
        places.setdefault(digest, len(due))
        due.append(digest)
    moved = {n: places.get(digest) for n, digest in enumerate(_rows(tensor)) if digest != due[n]}
    if not moved:
        return None
    (row, place), *others = moved.items()
    if place is None:
        return None
    if len(moved) == 2 and others[0] == (place, row):
        return f"rows {row} and {place} are exchanged"
    alien = sum(place is None for place in moved.values())
    more = f" and {len(moved) - 1} more are of other places, {alien} of none" if others else ""
    return f"row {row} holds what row {place} should{more}"


def _rows(tensor: LazyTensor) -> Iterable[bytes]:
    """A digest of each row, since the rows themselves would not fit in memory."""
    for rows in row_ranges(tensor):
        for row in tensor.read(*rows):
            yield blake2b(row.tobytes(), digest_size=16).digest()
