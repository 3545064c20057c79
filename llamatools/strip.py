"""A model file as a strip to scale: one character per cell of bytes, in a terminal of 80 columns.

A row is 64 cells, and a cell is a power of two of bytes, so that rows and pages begin at the same places. The first
cell of a tensor has its dtype's letter as a capital. Faults are shown however small they are; of everything else, a
cell shows what has most of its bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np

from .check.extents import FAULTS, MEANINGS, Extent, Kind, extents
from .check.placement import PAGE
from .check.residency import Residency
from .errors import printable
from .layout import Layout
from .views import human_bytes, matches

CELLS = 64  # a row
ROWS = 16  # of all strips together, where there are fewer files than that
LABEL = 14  # columns for the byte that a row begins with

SYMBOLS: dict[Kind, str] = {
    "header": "#", "records": ":", "padding": ".", "hole": "!", "overlap": "X", "trailing": "+", "missing": "-",
    "unread": "?",
}  # fmt: skip
KIND_STYLES: dict[Kind, str] = {
    "header": "black on bright_black", "records": "bright_black", "padding": "bright_black",
    "hole": "bold white on red", "overlap": "bold white on red", "missing": "bold white on red",
    "trailing": "black on bright_yellow", "unread": "bright_black",
}  # fmt: skip
# Of dtypes, that with most bytes first; they can be told apart by those who see few colours.
STYLES = tuple(f"black on {c}" for c in ("#7aa6f0", "#f2b34f", "#6cc79a", "#d58bd6", "#e58e7a", "#6fc4d6", "#c3c865"))

Line = list[tuple[str, str]]  # pieces of text, each with its style as rich has it


@dataclass(frozen=True)
class Strip:
    """The part of a file that is shown. start: a multiple of `cell`, the bytes per cell."""

    file: int
    start: int
    stop: int
    cell: int
    parts: Sequence[Extent]

    @property
    def n_cells(self) -> int:
        return -(-(self.stop - self.start) // self.cell)


def strips(layout: Layout, match: str | None = None) -> list[Strip]:
    """A strip for each file, all to one scale. match: only from the first to the last tensor that it finds."""
    shown = []
    for file in range(len(layout.files)):
        parts = extents(layout, file)
        if match is not None:
            found = [n for n, part in enumerate(parts) if part.tensor and matches(match, part.tensor.name)]
            parts = parts[found[0] : found[-1] + 1] if found else []
        if parts:
            shown.append((file, parts))
    cell = 1
    while shown and sum(_n_rows(parts, cell) for _, parts in shown) > max(ROWS, len(shown)):
        cell *= 2
    return [Strip(file, _floor(parts[0].start, cell), parts[-1].stop, cell, parts) for file, parts in shown]


def _n_rows(parts: Sequence[Extent], cell: int) -> int:
    return -(-(parts[-1].stop - _floor(parts[0].start, cell)) // (cell * CELLS))


def _floor(byte: int, cell: int) -> int:
    """Where a row begins: with a page, if it is no longer than one; otherwise anything that cells divide."""
    return byte // (cell * CELLS) * (cell * CELLS)


def lines(
    layout: Layout, match: str | None = None, *, resident: Mapping[int, Residency] | None = None
) -> Iterator[Line]:
    """The strips and what their signs mean. resident: by file; adds rows of the tenths that are in the page cache."""
    drawn = strips(layout, match)
    letters = _letters(layout)
    for strip in drawn:
        yield from _heading(layout, strip)
        cells = _cells(strip, letters)
        shares = _tenths(strip, resident[strip.file]) if resident and strip.file in resident else []
        for n in range(0, strip.n_cells, CELLS):
            start = strip.start + n * strip.cell
            begins_page = strip.cell * CELLS < PAGE and start % PAGE == 0
            yield [(f"{start:>{LABEL}}{'|' if begins_page else ' '} ", ""), *_runs(cells[n : n + CELLS])]
            if shares:
                yield [(f"{'in memory':>{LABEL}}  ", "bright_black"), *_runs(shares[n : n + CELLS])]
    if drawn:
        yield []
        yield from _legend(drawn, letters)
        if resident:
            yield [("", ""), ("  in memory: tenths of the pages; . none, # all", "bright_black")]


def _heading(layout: Layout, strip: Strip) -> Iterator[Line]:
    name = printable(layout.files[strip.file].path.name)
    size = human_bytes(layout.files[strip.file].size)
    scale = f"a cell is {human_bytes(strip.cell)}"
    room = CELLS + LABEL + 2 - len(size) - len(scale) - 4
    yield [(name if len(name) <= room else name[: room - 3] + "...", "bold"), (f"  {size}, {scale}", "")]
    if strip.cell <= PAGE // 2 and strip.cell * CELLS >= PAGE:
        ruler = "".join("|" if n * strip.cell % PAGE == 0 else " " for n in range(CELLS))
        yield [(f"{'pages of 4096':>{LABEL}}  {ruler.rstrip()}", "bright_black")]


def _letters(layout: Layout) -> dict[str, tuple[str, str]]:
    """Each dtype's letter and style."""
    names = [dtype.name for dtype in layout.nbytes_by_dtype()]
    return {name: (ascii_lowercase[n % 26], STYLES[n % len(STYLES)]) for n, name in enumerate(names)}


def _cells(strip: Strip, letters: Mapping[str, tuple[str, str]]) -> list[tuple[str, str]]:
    """Sign and style of each cell."""
    best: list[tuple[int, int, Extent | None]] = [(0, 0, None)] * strip.n_cells  # (is a fault, bytes, what)
    begins: set[int] = set()
    for part in strip.parts:
        first = (part.start - strip.start) // strip.cell
        if part.tensor and part.kind == "tensor" and part.start == part.tensor.offset:
            begins.add(first)
        for n in range(first, (part.stop - 1 - strip.start) // strip.cell + 1):
            start = strip.start + n * strip.cell
            nbytes = min(part.stop, start + strip.cell) - max(part.start, start)
            rank = (int(part.kind in FAULTS), nbytes)
            if rank > best[n][:2]:
                best[n] = (*rank, part)
    return [_sign(part, n in begins, letters) for n, (_, _, part) in enumerate(best)]


def _sign(part: Extent | None, begins: bool, letters: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    if part is None:  # before the first of the tensors that are shown
        return " ", ""
    if part.kind != "tensor":
        return SYMBOLS[part.kind], KIND_STYLES[part.kind]
    assert part.tensor is not None
    letter, style = letters[part.tensor.dtype.name]
    return letter.upper() if begins else letter, style


def _tenths(strip: Strip, resident: Residency) -> list[tuple[str, str]]:
    """For each cell, the part of it that is in the page cache: '.', 1 to 9 tenths, '#'."""
    edges = strip.start + strip.cell * np.arange(strip.n_cells + 1, dtype=np.int64)
    edges = edges.clip(None, strip.stop)
    signs = []
    for share in resident.shares(edges):
        tenths = int(share * 10)
        sign = "#" if share == 1 else "." if share == 0 else str(max(tenths, 1))
        signs.append((sign, "green" if share else "bright_black"))
    return signs


def _runs(cells: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Neighbours of one style as one piece."""
    text, style = "", ""
    for sign, of in cells:
        if of != style and text:
            yield text, style
            text = ""
        text, style = text + sign, of
    yield text, style


def _legend(drawn: Sequence[Strip], letters: Mapping[str, tuple[str, str]]) -> Iterator[Line]:
    """What each sign means, its bytes, and in how many places it is."""
    nbytes: Counter[str] = Counter()
    places: Counter[str] = Counter()
    for part in (part for strip in drawn for part in strip.parts):
        name = part.tensor.dtype.name if part.tensor and part.kind == "tensor" else part.kind
        nbytes[name] += part.nbytes
        places[name] += 1
    signs = {name: (letter.upper() + letter, style, name) for name, (letter, style) in letters.items()}
    signs |= {kind: (sign, KIND_STYLES[kind], MEANINGS[kind]) for kind, sign in SYMBOLS.items()}
    for name, (sign, style, meaning) in signs.items():
        if nbytes[name]:
            what = "tensor" if name in letters else "place"
            count = f"{places[name]} {what}{'' if places[name] == 1 else 's'}"
            yield [("  ", ""), (f"{sign:<2}", style), (f"  {meaning:<44} {human_bytes(nbytes[name]):>14}  {count}", "")]
