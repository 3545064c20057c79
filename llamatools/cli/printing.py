"""Printing: tables, styled lines, JSON, reports, and a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol
from unicodedata import category

from ..errors import printable

if TYPE_CHECKING:
    from ..strip import Line
    from ..views import Table


class Report(Protocol):
    """What the runtime found: for JSON, and as lines for people."""

    def as_dict(self) -> dict[str, Any]: ...
    def lines(self) -> list[str]: ...


def print_report(report: Report, as_json: bool) -> None:
    if as_json:
        print_json(report.as_dict())
    else:
        for line in report.lines():
            print(line)


def print_table(table: Table) -> None:
    """A rich table on a terminal that is wide enough for it, aligned plain text in a pipe."""
    if not sys.stdout.isatty():
        for line in table.lines():
            print(line)
        return
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    rich_table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for n, heading in enumerate(table.headings):
        right = n in table.right
        rich_table.add_column(heading, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in table.rows:
        rich_table.add_row(*map(Text, row))
    Console(highlight=False).print(rich_table)


def print_styled(lines: Iterable[Line]) -> None:
    """Pieces of text in their styles on a terminal, without them in a pipe."""
    if not sys.stdout.isatty():
        for line in lines:
            print("".join(text for text, _ in line).rstrip())
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in lines:
        console.print(Text.assemble(*line), no_wrap=True, crop=False, overflow="ignore")


def print_json(facts: dict[str, Any] | list[dict[str, Any]]) -> None:
    print(json.dumps(facts, indent=2))


def print_text(text: str) -> None:
    """Text that a model wrote: as it is into a pipe, and so that it does nothing but be read on a terminal."""
    print(_harmless(text) if sys.stdout.isatty() else text, end="", flush=True)


def _harmless(text: str) -> str:
    """`text` with what controls a terminal, or turns letters around, written as escapes."""
    controls = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(printable(c) if category(c) in controls and c not in "\n\t\u200c\u200d" else c for c in text)


class Bar:
    """A progress bar on stderr, if that is a terminal; made when there is something to show."""

    def __init__(self, unit: str = "B") -> None:
        self._bar: Any = None
        self._unit = unit

    def __enter__(self) -> Bar:
        return self

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if self._bar is None:
            if not sys.stderr.isatty():
                return
            from tqdm import tqdm

            scaled = self._unit == "B"
            self._bar = tqdm(total=total, unit=self._unit, unit_scale=scaled, leave=False, dynamic_ncols=True)
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
