"""How a layout is shown: as lines, as tables, as JSON. Everything from a file is escaped before it is shown."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .check import Finding
from .check.placement import mapping
from .checkpoint import Note
from .errors import UsageError, printable
from .layout import Layout
from .metadata import Kind, Value

SHOWN_ITEMS = 3  # of a long array
SHOWN_CHARACTERS = 60  # of a long string
SCHEMA = "llamatools.inspect/1"


@dataclass(frozen=True)
class Table:
    """Headings and rows of cells. right: columns of numbers, set flush right."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    right: frozenset[int] = frozenset()

    def lines(self) -> Iterator[str]:
        """As plain text, for a pipe."""
        widths = [max(map(len, column)) for column in zip(self.headings, *self.rows, strict=True)]
        for row in (self.headings, *self.rows):
            cells = (
                cell.rjust(width) if n in self.right else cell.ljust(width)
                for n, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            yield "  ".join(cells).rstrip()


def note_lines(notes: Sequence[Note]) -> Iterator[str]:
    """What was derived, each with its reason and the option that chooses otherwise."""
    for note in notes:
        option = f" [{note.option}]" if note.option else ""
        yield printable(f"{note.what} {note.value}: {note.reason}{option}")


def tensor_table(layout: Layout, match: str | None = None) -> Table:
    """A row per tensor. match: a regular expression searched in names."""
    many = len({tensor.file for tensor in layout.tensors}) > 1
    rows: list[tuple[str, ...]] = []
    for tensor in layout.tensors:
        if matches(match, tensor.name):
            file = (layout.files[tensor.file].path.name.removeprefix("consolidated."),) if many else ()
            shape = "x".join(map(str, tensor.shape)) + (" strided" if tensor.strides else "")
            cells = (tensor.name, tensor.dtype.name, shape, f"{tensor.offset}", f"{tensor.nbytes}")
            rows.append(tuple(map(printable, (*file, *cells, power_of_two(tensor.alignment)))))
    headings = ("tensor", "dtype", "shape", "offset", "bytes", "align")
    first_number = 4 if many else 3
    right = frozenset(range(first_number, first_number + 3))
    return Table((("file", *headings) if many else headings), rows, right)


def metadata_table(layout: Layout, match: str | None = None, *, full: bool = False) -> Table:
    """A row per metadata key; long values are shortened unless `full`."""
    rows: list[tuple[str, ...]] = [
        (printable(key), _kind(value), printable(_whole(value) if full else _shortened(value)))
        for key, value in layout.metadata.items()
        if matches(match, key)
    ]
    return Table(("key", "type", "value"), rows)


def as_json(
    layout: Layout, match: str | None = None, *, findings: Sequence[Finding] = (), full: bool = False
) -> dict[str, Any]:
    """Everything that the views show, in a schema that only grows.

    Arrays of metadata are given by their length, and their values only if `full`.
    """
    found = mapping(layout)
    return {
        "schema": SCHEMA,
        "format": layout.format,
        "files": [{"name": printable(file.path.name), "nbytes": file.size} for file in layout.files],
        "nbytes": layout.size,
        "alignment": layout.alignment,
        "header_end": layout.header_end,
        "data_offset": layout.data_offset,
        "stopped_at": layout.stopped_at,
        "alignment_held": found.alignment,
        "mapped_in_place": found.in_place,
        "mapped_by_pages": found.by_pages,
        "findings": [finding_json(finding) for finding in findings],
        "hparams": dataclasses.asdict(layout.hparams) if layout.hparams else None,
        "tokenizer": _tokenizer_json(layout),
        "n_weights": layout.n_weights,
        "nbytes_by_dtype": {dtype.name: nbytes for dtype, nbytes in layout.nbytes_by_dtype().items()},
        "notes": [dataclasses.asdict(note) for note in layout.notes],
        "dropped": {printable(name): reason for name, reason in layout.dropped.items()},
        "metadata": {
            printable(key): {"type": _kind(value), "value": _json_value(value, full)}
            for key, value in layout.metadata.items()
            if matches(match, key)
        },
        "tensors": [
            {
                "name": printable(tensor.name),
                "file": tensor.file,
                "dtype": tensor.dtype.name,
                "shape": list(tensor.shape),
                "offset": tensor.offset,
                "nbytes": tensor.nbytes,
                "alignment": tensor.alignment,
                "strides": list(tensor.strides) if tensor.strides else None,
            }
            for tensor in layout.tensors
            if matches(match, tensor.name)
        ],
    }


def finding_json(finding: Finding) -> dict[str, Any]:
    """A finding as JSON has it: bytes are the first and the one after the last."""
    return {
        "severity": finding.severity,
        "code": finding.code,
        "file": printable(finding.file) if finding.file else None,
        "where": printable(finding.where) if finding.where else None,
        "bytes": list(finding.span) if finding.span else None,
        "what": printable(finding.what),
        "remedy": finding.remedy,
    }


def human_bytes(n: int) -> str:
    """Bytes as people read them; exact below a million."""
    if n < 1_000_000:
        return f"{n:,} bytes"
    return f"{n / 1e9:.2f} GB" if n >= 1_000_000_000 else f"{n / 1e6:.2f} MB"


def power_of_two(n: int) -> str:
    """An alignment, short: 32, 4K, 2M."""
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if n >= size:
            return f"{n // size}{unit}"
    return str(n)


def matches(pattern: str | None, name: str) -> bool:
    """Whether a regular expression is found in a name; None is found in all. Raises UsageError for none."""
    try:
        return pattern is None or re.search(pattern, name) is not None
    except re.error as error:
        raise UsageError(f"{pattern!r} is no regular expression: {error}", where="--match") from error


def _kind(value: Value) -> str:
    return f"{value.item}[{len(value.data)}]" if value.kind is Kind.ARRAY else str(value.kind)


def _shortened(value: Value) -> str:
    if value.kind is not Kind.ARRAY:
        text = str(value.data)
        return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"
    return _items(value, SHOWN_ITEMS) + (", ...]" if len(value.data) > SHOWN_ITEMS else "]")


def _whole(value: Value) -> str:
    return _items(value, len(value.data)) + "]" if value.kind is Kind.ARRAY else str(value.data)


def _items(value: Value, n: int) -> str:
    """The first n items of an array, and its opening bracket."""
    return "[" + ", ".join(repr(item) if value.item is Kind.STRING else f"{item}" for item in value.data[:n])


def _json_value(value: Value, full: bool) -> Any:
    if value.kind is not Kind.ARRAY:
        return _json_scalar(value.data)
    items = {"items": len(value.data)}
    values = value.data if value.item is Kind.STRING else value.data.tolist()
    return items | {"values": [_json_scalar(item) for item in values]} if full else items


def _json_scalar(item: Any) -> Any:
    """Text as it can be shown; what JSON has no number for, as text."""
    if isinstance(item, str):
        return printable(item)
    return item if not isinstance(item, float) or math.isfinite(item) else str(item)


def _tokenizer_json(layout: Layout) -> dict[str, Any] | None:
    t = layout.tokenizer
    if t is None:
        return None
    return {
        "model": t.model,
        "pre": t.pre,
        "n_tokens": len(t.tokens),
        "n_merges": len(t.merges),
        "special": dict(t.special),
        "add_bos": t.add_bos,
        "add_eos": t.add_eos,
        "add_space_prefix": t.add_space_prefix,
        "has_chat_template": t.chat_template is not None,
    }
