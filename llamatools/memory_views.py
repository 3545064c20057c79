"""How memory is shown: which pages of a model are in it now, and what running the model will take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .check.memory import Need
from .check.residency import PAGE, Residency, residency
from .errors import printable
from .layout import Layout
from .views import Table, human_bytes, matches


def residencies(layout: Layout) -> dict[int, Residency]:
    """By each file's index in the layout, which of its pages are in the page cache. Raises as `residency`."""
    return {n: residency(file.path) for n, file in enumerate(layout.files)}


def residency_table(layout: Layout, resident: Mapping[int, Residency], match: str | None = None) -> Table:
    """A row per tensor: pages that hold bytes of it, how many of them are in the page cache, and their part."""
    rows: list[tuple[str, ...]] = []
    for tensor in layout.tensors:
        if matches(match, tensor.name):
            n_pages, n_resident = resident[tensor.file].pages(tensor)
            rows.append(
                (printable(tensor.name), tensor.dtype.name, f"{n_pages}", f"{n_resident}", part(n_resident, n_pages))
            )
    return Table(("tensor", "dtype", "pages", "in memory", "part"), rows, frozenset({2, 3, 4}))


def residency_lines(layout: Layout, resident: Mapping[int, Residency]) -> Iterator[str]:
    """A line for each file."""
    for n, file in enumerate(layout.files):
        nbytes = min(resident[n].between(0, file.size), file.size)
        what = f"{human_bytes(nbytes)} of {human_bytes(file.size)} are in the page cache"
        yield f"{printable(file.path.name)}: {what} ({part(nbytes, file.size)}), in pages of {PAGE}"


def residency_json(layout: Layout, resident: Mapping[int, Residency], match: str | None = None) -> dict[str, Any]:
    """In pages of `page` bytes: those of each file and of each tensor, and those of them that are in the page cache."""
    files = []
    for n, file in enumerate(layout.files):
        pages = -(-file.size // PAGE)
        files.append({"pages": pages, "resident": resident[n].between(0, pages * PAGE) // PAGE})
    tensors = []
    for tensor in layout.tensors:
        if matches(match, tensor.name):
            n_pages, n_resident = resident[tensor.file].pages(tensor)
            tensors.append({"name": printable(tensor.name), "pages": n_pages, "resident": n_resident})
    return {"page": PAGE, "files": files, "tensors": tensors}


def needs_lines(needs: Sequence[Need]) -> Iterator[str]:
    """Two lines for each: how much, and what that means."""
    for need in needs:
        yield f"{need.name:<28}{human_bytes(need.nbytes):>14}"
        yield f"    {need.meaning}"


def needs_json(needs: Sequence[Need]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {"for": need.name, "nbytes": need.nbytes, "shared": need.is_shared, "meaning": need.meaning} for need in needs
    ]


def part(n: int, of: int) -> str:
    """In percent; all and none are said of nothing else."""
    return f"{min(max(100 * n / of, 0.1), 99.9) if 0 < n < of else 100 * n / of:.1f}%" if of else "-"
