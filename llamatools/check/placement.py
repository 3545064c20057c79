"""Where tensors lie: alignment, and whether the file can be used from its mapping without a copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import or_

from ..dtypes import DType
from ..errors import UsageError
from ..layout import Layout, PlacedTensor
from .finding import Finding

PAGE = 4096  # bytes that an operating system maps at least


@dataclass(frozen=True)
class Mapping:
    """How the tensors of a file can be used from its mapping.

    alignment: the largest power of two at whose multiples every tensor begins; 0 for no tensors, or only offset 0.
    needed: the largest number that a dtype of the file is made of, in bytes.
    copied: tensors that must be copied to be used, since their numbers are not aligned or their rows lie apart.
    """

    alignment: int
    needed: int
    copied: tuple[PlacedTensor, ...]

    @property
    def in_place(self) -> bool:
        return not self.copied

    @property
    def by_pages(self) -> bool:
        """Whether each tensor begins with a page, so that it can be mapped alone."""
        return self.alignment % PAGE == 0


def mapping(layout: Layout) -> Mapping:
    """How the tensors of a layout can be used from its mapping."""
    offsets = reduce(or_, (tensor.offset for tensor in layout.tensors), 0)
    needs = {tensor.dtype: number_nbytes(tensor.dtype) for tensor in layout.tensors}
    copied = tuple(t for t in layout.tensors if t.strides or t.offset % needs[t.dtype])
    return Mapping(offsets & -offsets, max(needs.values(), default=1), copied)


def number_nbytes(dtype: DType) -> int:
    """Bytes of the largest number in a block: what its address must be a multiple of."""
    block = dtype.block
    if block.fields:
        return max(field.base.itemsize for field, *_ in block.fields.values())
    if block.kind == "V":  # a type known by its size only; ggml's have float16 scales
        return 2 if dtype.is_quantized else 1
    return block.base.itemsize


def check(layout: Layout, align: int | None = None) -> Iterator[Finding]:
    """align: what the user asserts. Raises UsageError where that is no power of two."""
    if align is not None and (align <= 0 or align & (align - 1)):
        raise UsageError(f"{align} is no power of two", where="--align")
    if layout.stopped_at is not None:
        return  # where tensors lie is not known
    wanted = align or 1  # what the format promises was held against the file when it was read
    off = [tensor for tensor in layout.tensors if tensor.offset % wanted]
    if off:
        n = f"{len(off)} of {len(layout.tensors)} tensors do"
        yield Finding(
            "misaligned",
            f"{n} not begin at a multiple of {wanted}; this one begins at byte {off[0].offset}",
            file=str(layout.files[off[0].file].path),
            where=f"tensor {off[0].name!r}",
            span=(off[0].offset, off[0].end),
            remedy=f"`llamatools convert --align {wanted}` lays it out so",
        )
    first = next((tensor for tensor in mapping(layout).copied if not tensor.strides), None)
    if first:
        yield Finding(
            "not-in-place",
            f"its numbers of {number_nbytes(first.dtype)} bytes begin at byte {first.offset}, so that they cannot be "
            "used without a copy",
            file=str(layout.files[first.file].path),
            where=f"tensor {first.name!r}",
            span=(first.offset, first.end),
        )
    is_explained = any(problem.code == "alignment-mismatch" for problem in layout.problems)
    if layout.format.startswith("GGUF") and not is_explained:
        yield from _end_of_file(layout)


def _end_of_file(layout: Layout) -> Iterator[Finding]:
    """Bytes behind the last tensor of a GGUF file, or padding that is missing there. llama.cpp takes both."""
    alignment = layout.alignment or 1
    for n, file in enumerate(layout.files):
        end = max((tensor.end for tensor in layout.tensors if tensor.file == n), default=None)
        if end is None:
            continue
        padded = -(-end // alignment) * alignment
        if file.size > padded:
            what = f"{file.size - padded} bytes follow the last tensor, which ends at byte {end}"
            yield Finding("trailing", what, str(file.path), span=(padded, file.size))
        elif end <= file.size < padded:
            what = f"the padding behind the last tensor is {file.size - end} bytes, where {padded - end} are usual"
            yield Finding("unpadded", what, str(file.path), span=(end, file.size))
