"""Planning a GGUF that is laid out anew, with the tensors and keys that it has.

So files whose offsets or padding are wrong are mended, as llama-quantize and llama-gguf-split make them of files that
are not aligned to 32; so alignment is changed, and sets of files become one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .check import placement
from .checkpoint import Note
from .errors import FormatError, printable
from .fill import Filled
from .formats.gguf_placement import MENDABLE
from .formats.gguf_write import ALIGNMENT_KEY, DEFAULT_ALIGNMENT
from .layout import Layout, PlacedTensor
from .metadata import Kind, Metadata, parse_setting, string
from .plan import Plan, placed
from .provenance import UNKNOWN, recorded_digests, source_name
from .quantization import read_plan
from .tensors import FileTensor


def mendable(layout: Layout) -> Layout:
    """This layout, if nothing is wrong but where its tensors are said to lie. Raises its first other problem."""
    for problem in layout.problems:
        if problem.code not in MENDABLE:
            raise problem
    return layout


def faults(layout: Layout) -> tuple[str, ...]:
    """What laying the file out anew mends, each as a line."""
    told = [": ".join(part for part in (error.file, error.where, error.what) if part) for error in layout.problems]
    ends = [finding for finding in placement.check(layout) if finding.code in ("trailing", "unpadded")]
    return tuple(map(printable, (*told, *(f"{finding.file}: {finding.what}" for finding in ends))))


def plan_rewritten(
    layout: Layout,
    destination: Path,
    *,
    alignment: int | None = None,
    name: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> Plan:
    """The single GGUF file that a `mendable` layout becomes.

    alignment: None keeps what the source states, if that can be. name, settings: as of `plan_gguf`.
    Raises UsageError for an alignment or a setting that cannot be.
    """
    plan = read_plan(layout)
    metadata = dict(plan.layout.metadata)
    if name is not None:
        metadata["general.name"] = string(name)
    metadata |= {key: parse_setting(key, text, metadata.get(key)) for key, text in (settings or {}).items()}
    notes = layout.notes
    if alignment is None:
        alignment, reason = _kept_alignment(layout.metadata)
        notes += (Note("alignment", str(alignment), reason, "--align"),)
    if len(layout.files) > 1:
        notes += (Note("files", "joined", f"the source is a set of {len(layout.files)}", "--split-size"),)
    return placed(replace(plan.layout, metadata=metadata, notes=notes), destination, alignment)


def _kept_alignment(metadata: Metadata) -> tuple[int, str]:
    """The alignment that a file with these keys is to have, and why."""
    stated = metadata.get(ALIGNMENT_KEY)
    if stated is None:
        return DEFAULT_ALIGNMENT, f"the source states none, which means {DEFAULT_ALIGNMENT}"
    alignment = int(stated.data) if stated.kind is Kind.UINT32 else 0
    if alignment < DEFAULT_ALIGNMENT or alignment & (alignment - 1):
        return DEFAULT_ALIGNMENT, f"the source says {stated.data}, which is not written"
    return alignment, "the source says so"


def recorded_tensors(source: Layout) -> list[tuple[PlacedTensor, str]]:
    """The tensors whose SHA-256 the file holds, with it; not those that changed dtype or shape since."""
    recorded = recorded_digests(source.metadata)
    known = [(tensor, recorded[tensor.name]) for tensor in source.tensors if tensor.name in recorded]
    return [(tensor, it.sha256) for tensor, it in known if it.sha256 != UNKNOWN and not it.is_stale(tensor)]


def require_recorded(source: Layout, planned: Layout, filled: Filled) -> None:
    """Holds the SHA-256 of tensors, as they were read, against those that llamatools stored when it wrote the file.

    Those of which `filled` knows none are passed over: what was read to be cast is hashed only if `Care` says so. What
    another tool made of a tensor since, in another dtype or shape, cannot be told. Raises FormatError.
    """
    copied = {tensor.source for tensor in planned.tensors if isinstance(tensor.source, FileTensor)}
    for tensor, stored in recorded_tensors(source):
        assert isinstance(tensor.source, FileTensor), "it was read from a file"
        if tensor.source in copied:
            found = filled.digests[tensor.name]
        else:
            found = filled.source_digests.get(source_name(tensor.source), stored)
        if found != stored:
            raise FormatError(
                f"its bytes have the SHA-256 {found}, but {stored} was stored when they were written",
                where=f"tensor {tensor.name!r}",
                todo="It was damaged since; make or download the file again",
                file=tensor.source.file.path,
                code="digest",
                span=(tensor.offset, tensor.end),
            )
