"""Findings about a layout: what is wrong with a model file, or worth knowing, and how to mend it.

Each module looks at one side of a layout and yields findings; none knows of another.
"""

from __future__ import annotations

from ..layout import Layout
from . import keys, model, placement, tail
from .finding import SEVERITIES, Finding, Severity, of_error

ORDER: tuple[Severity, ...] = ("error", "warning", "note")


def findings(layout: Layout, *, align: int | None = None) -> list[Finding]:
    """All that is found without reading the tensors' data, errors first.

    align: assert that every tensor begins at a multiple of it. Raises UsageError where that is no power of two.
    """
    found = [of_error(problem) for problem in layout.problems]
    found += placement.check(layout, align)
    found += tail.check(layout)
    if layout.format.startswith("GGUF"):
        found += keys.check(layout)
        found += model.check(layout)
    if layout.format == "Hugging Face":
        found += model.check_hugging_face(layout)
    return by_severity(found)


def by_severity(found: list[Finding]) -> list[Finding]:
    """Errors first, each once."""
    return sorted(dict.fromkeys(found), key=lambda finding: ORDER.index(finding.severity))


__all__ = ["SEVERITIES", "Finding", "Severity", "by_severity", "findings"]
