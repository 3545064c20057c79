"""Writes docs/reference/command-line.md from the command line itself: `make docs`. A test fails where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer
from typer.main import get_command

from llamatools.cli import command_line

PATH = Path(__file__).parent / "reference" / "command-line.md"
WIDTH = 80

HEAD = """# Command line

Made from `llamatools/cli/` by `make docs`; do not edit.

Data go to stdout, progress and prose to stderr; `--json` turns the data into one JSON object, in a schema that only
grows. Exit codes are [listed apart](exit-codes.md). An argument that begins with a dash goes after `--`.
"""


def text() -> str:
    return HEAD + "".join(f"\n## {title}\n\n```\n{shown}\n```\n" for title, shown in _helps())


def _helps() -> Iterator[tuple[str, str]]:
    group = get_command(command_line())
    context = typer.Context(group, info_name="llamatools", terminal_width=WIDTH)
    yield "llamatools", group.get_help(context)
    for name, command in getattr(group, "commands", {}).items():
        inner = typer.Context(command, info_name=name, parent=context, terminal_width=WIDTH)
        yield f"llamatools {name}", command.get_help(inner)


if __name__ == "__main__":
    PATH.write_text(text(), "utf-8")
