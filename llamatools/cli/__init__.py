"""The command line: parse, call the library once, print. Data go to stdout, progress and prose to stderr.

One module per command. Nothing outside this package imports typer.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ..version import __version__
from .convert_command import convert
from .exits import run_and_exit
from .inspect_command import inspect
from .quantize_command import quantize
from .run_command import run

app = typer.Typer(
    name="llamatools",
    help="LLaMA model files: converted, explained, run and proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llamatools {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


for command in (convert, quantize, inspect, run):
    app.command()(command)


def main() -> None:
    """Runs the command line and exits with its code."""
    run_and_exit(app)
