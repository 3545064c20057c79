"""The command line: parse, call the library once, print. Data go to stdout, progress and prose to stderr.

One module per command. Nothing outside this package imports typer.
"""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from typing import Annotated

import typer

from ..version import __version__
from .exits import run_and_exit

COMMANDS = ("convert", "quantize", "inspect", "run")


def command_line(*names: str) -> typer.Typer:
    """The command line with these commands, by default all."""
    app = typer.Typer(
        name="llamatools",
        help="LLaMA model files: converted, explained, run and proven.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    for name in names or COMMANDS:
        app.command()(getattr(import_module(f".{name}_command", __package__), name))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llamatools {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line and exits with its code."""
    gc.set_threshold(100_000)  # what is imported and read at the start is no garbage; looking for some takes 20 ms
    asked = [name for name in sys.argv[1:2] if name in COMMANDS]
    if asked != ["run"]:  # no other multiplies matrices, and numpy's threads keep processors busy waiting for some
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    run_and_exit(command_line(*asked))  # to describe the options of all takes longer than to open a model
