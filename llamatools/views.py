"""How a layout is shown: as lines, as tables, as JSON. Everything from a file is escaped before it is shown."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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


def summary(layout: Layout) -> list[tuple[str, str]]:
    """The facts most people want, as (label, text)."""
    aligned = f", tensors aligned to {layout.alignment}" if layout.alignment else ""
    facts = [
        ("file" if len(layout.files) == 1 else "files", ", ".join(file.path.name for file in layout.files)),
        ("format", f"{layout.format}, {human_bytes(layout.size)}{aligned}"),
    ]
    identity = [layout.metadata[key] for key in ("general.name", "general.architecture") if key in layout.metadata]
    if identity:
        facts.append(("model", ", ".join(str(value.data) for value in identity)))
    if layout.hparams:
        h = layout.hparams
        scaled = f", scaled by {h.rope_scaling.factor:g}" if h.rope_scaling else ""
        facts += [
            ("shape", f"{h.n_layers} layers, dim {h.dim}, hidden {h.hidden_dim}"),
            ("heads", f"{h.n_heads} of width {h.head_dim}, {h.n_kv_heads} for keys and values"),
            ("context", f"{h.max_seq_len} tokens, rope_theta {h.rope_theta:g}{scaled}"),
            ("norm_eps", f"{h.norm_eps:.3g}"),
        ]
    if layout.tokenizer:
        t = layout.tokenizer
        facts.append(("tokenizer", f"{t.model} ({t.pre}), {len(t.tokens)} tokens"))
        if t.special:
            facts.append(("special", ", ".join(f"{role} {id_}" for role, id_ in t.special.items())))
    facts.append(("weights", f"{layout.n_weights:,} in {len(layout.tensors)} tensors"))
    facts += [("", f"{human_bytes(nbytes)} {dtype}") for dtype, nbytes in layout.nbytes_by_dtype().items()]
    return [(label, printable(text)) for label, text in facts]


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
        if _matches(match, tensor.name):
            file = (layout.files[tensor.file].path.name.removeprefix("consolidated."),) if many else ()
            shape = "x".join(map(str, tensor.shape)) + (" strided" if tensor.strides else "")
            cells = (tensor.name, tensor.dtype.name, shape, f"{tensor.offset}", f"{tensor.nbytes}")
            rows.append(tuple(map(printable, (*file, *cells, power_of_two(tensor.alignment)))))
    headings = ("tensor", "dtype", "shape", "offset", "bytes", "align")
    first_number = 4 if many else 3
    right = frozenset(range(first_number, first_number + 3))
    return Table((("file", *headings) if many else headings), rows, right)


def metadata_table(layout: Layout, match: str | None = None) -> Table:
    """A row per metadata key; long values are shortened."""
    rows: list[tuple[str, ...]] = [
        (printable(key), _kind(value), printable(_shortened(value)))
        for key, value in layout.metadata.items()
        if _matches(match, key)
    ]
    return Table(("key", "type", "value"), rows)


def as_json(layout: Layout, match: str | None = None) -> dict[str, Any]:
    """Everything that the views show, in a schema that only grows. Arrays of metadata are given by their length."""
    return {
        "schema": SCHEMA,
        "format": layout.format,
        "files": [{"name": printable(file.path.name), "nbytes": file.size} for file in layout.files],
        "nbytes": layout.size,
        "alignment": layout.alignment,
        "data_offset": layout.data_offset,
        "hparams": dataclasses.asdict(layout.hparams) if layout.hparams else None,
        "tokenizer": _tokenizer_json(layout),
        "n_weights": layout.n_weights,
        "nbytes_by_dtype": {dtype.name: nbytes for dtype, nbytes in layout.nbytes_by_dtype().items()},
        "notes": [dataclasses.asdict(note) for note in layout.notes],
        "dropped": {printable(name): reason for name, reason in layout.dropped.items()},
        "metadata": {
            printable(key): {"type": _kind(value), "value": _json_value(value)}
            for key, value in layout.metadata.items()
            if _matches(match, key)
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
            if _matches(match, tensor.name)
        ],
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


def _matches(pattern: str | None, name: str) -> bool:
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
    items = [repr(item) if value.item is Kind.STRING else f"{item}" for item in value.data[:SHOWN_ITEMS]]
    return "[" + ", ".join(items) + (", ...]" if len(value.data) > SHOWN_ITEMS else "]")


def _json_value(value: Value) -> Any:
    if value.kind is Kind.ARRAY:
        return {"items": len(value.data)}
    return printable(value.data) if value.kind is Kind.STRING else value.data


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
