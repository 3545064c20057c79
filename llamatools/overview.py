"""The default view of a model file: what it is, in a terminal of 80 columns, a verdict, and the findings behind it."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from .check import Finding, Severity
from .check.placement import PAGE, mapping
from .errors import printable
from .layout import Layout
from .metadata import Kind
from .views import human_bytes, note_lines

WIDTH = 80
LABEL = 12  # columns for what a line is about
SHOWN = 3  # findings of one code; a damaged file can have thousands


def overview(layout: Layout, findings: Sequence[Finding]) -> Iterator[str]:
    """Lines of at most 80 columns."""
    for label, text in [*facts(layout), ("verdict", verdict(findings))]:
        yield from _wrapped(label, text)
    yield from finding_lines(findings)


def verdict(findings: Sequence[Finding]) -> str:
    """How many findings of each severity there are; "sound" where none is an error or a warning."""
    n: Counter[Severity] = Counter(finding.severity for finding in findings)
    counts = [_plural(n[severity], severity) for severity in ("error", "warning", "note") if n[severity]]
    return ", ".join(counts if n["error"] or n["warning"] else ["sound", *counts])


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Each finding with its severity and code, wrapped; of many with one code the first few."""
    n = Counter(finding.code for finding in findings)
    shown: Counter[str] = Counter()
    for finding in findings:
        shown[finding.code] += 1
        if shown[finding.code] <= SHOWN:
            yield from _wrapped(finding.severity, f"{finding.code}: {finding}")
        elif shown[finding.code] == n[finding.code]:
            yield from _wrapped("", f"{finding.code}: {n[finding.code] - SHOWN} more; --json lists them all")


def facts(layout: Layout) -> Iterator[tuple[str, str]]:
    """(label, text) of what most people want to know."""
    yield ("file" if len(layout.files) == 1 else "files"), ", ".join(file.path.name for file in layout.files)
    yield "format", f"{layout.format}, {human_bytes(layout.size)}"
    if layout.stopped_at is not None:
        yield "read to", f"byte {layout.stopped_at} of {layout.size}; the header cannot be understood from there on"
    model = [_text(layout, "general.name"), _text(layout, "general.architecture")]
    if any(model):
        yield "model", ", ".join(part for part in model if part)
    if layout.tensors:
        yield from _weights(layout)
    if layout.hparams:
        h = layout.hparams
        scaled = f", scaled by {h.rope_scaling.factor:g}" if h.rope_scaling else ""
        yield "shape", f"{_plural(h.n_layers, 'layer')}, dim {h.dim}, hidden {h.hidden_dim}, norm_eps {h.norm_eps:.3g}"
        yield "heads", f"{h.n_heads} of width {h.head_dim}, {h.n_kv_heads} for keys and values"
        yield "context", f"{h.max_seq_len} tokens, rope_theta {h.rope_theta:g}{scaled}"
    if layout.tokenizer:
        t = layout.tokenizer
        special = "".join(f", {role} {id_}" for role, id_ in t.special.items())
        yield "tokenizer", f"{t.model} ({t.pre}), {len(t.tokens)} tokens{special}"
    if layout.tensors and layout.stopped_at is None:
        yield from _alignment(layout)
    for line in note_lines(layout.notes):
        yield "derived", line
    for name, reason in layout.dropped.items():
        yield "left out", f"{name}: {reason}"


def _weights(layout: Layout) -> Iterator[tuple[str, str]]:
    nbytes = sum(tensor.nbytes for tensor in layout.tensors)
    bits = f", {8 * nbytes / layout.n_weights:.2f} bits per weight" if layout.n_weights else ""
    yield "parameters", f"{human_count(layout.n_weights)} in {_plural(len(layout.tensors), 'tensor')}{bits}"
    by_dtype = layout.nbytes_by_dtype()
    parts = [
        f"{dtype} {human_bytes(n)}{f' ({_percent(n / nbytes)})' if nbytes else ''}" for dtype, n in by_dtype.items()
    ]
    yield "dtypes", ", ".join(parts)


def _alignment(layout: Layout) -> Iterator[tuple[str, str]]:
    found = mapping(layout)
    needs = f"its dtypes need {found.needed}"
    promised = f"the file promises {layout.alignment}, {needs}" if layout.alignment else needs
    yield "alignment", f"{found.alignment} holds for every tensor; {promised}"
    if found.in_place:
        whole = "in place, without a copy"
    else:
        whole = f"{_plural(len(found.copied), 'tensor')} must be copied to be used"
    pages = f"each tensor begins with a page of {PAGE}" if found.by_pages else f"tensors share pages of {PAGE}"
    yield "mapping", f"{whole}; {pages} bytes"


def _text(layout: Layout, key: str) -> str | None:
    value = layout.metadata.get(key)
    return str(value.data) if value and value.kind is Kind.STRING else None


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        printable(text),
        WIDTH,
        initial_indent=label.ljust(LABEL),
        subsequent_indent=" " * LABEL,
        break_on_hyphens=False,
    )


def _plural(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _percent(part: float) -> str:
    return "<1%" if 0 < part < 0.005 else f"{part:.0%}"


def human_count(n: int) -> str:
    """A count as people read it; exact below a million."""
    if n < 1_000_000:
        return f"{n:,}"
    return f"{n / 1e9:.2f} billion" if n >= 1_000_000_000 else f"{n / 1e6:.2f} million"
