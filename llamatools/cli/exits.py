"""How the program ends: the only place where errors and signals become exit codes (docs/reference/exit-codes.md)."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any

import typer

from ..errors import (
    EXIT_NO_SPACE,
    EXIT_SIGINT,
    EXIT_SIGPIPE,
    EXIT_USAGE,
    Interrupted,
    LlamatoolsError,
    printable,
)

# Raised by the parser for bad arguments. Typer exports its subclass only, since it carries click inside.
_ParserError: Any = typer.BadParameter.__base__


def _run(app: typer.Typer) -> int:
    try:
        code: int = app(prog_name="llamatools", standalone_mode=False) or 0
    except _ParserError as error:
        message = error.format_message()
        if len(sys.argv) > 1:  # without arguments, the message is the help
            command = error.ctx.command_path if error.ctx else "llamatools"
            message = f"{message.rstrip('.')}. See {command} --help"
        print(message, file=sys.stderr)
        return EXIT_USAGE
    except SystemExit:  # how the parser ends where stdout's reader has gone
        raise BrokenPipeError from None
    if code == EXIT_SIGINT:  # the parser swallows the exception
        raise KeyboardInterrupt
    return code


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; the clean-up is not to be disturbed
    raise Interrupted


def _prepare_streams() -> None:
    """Closed streams give nothing and keep nothing; what stdout's encoding has no letter for is escaped."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 (for as long as the process lives)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_and_exit(app: typer.Typer) -> None:
    """Runs the command line and exits with its code; whatever goes wrong is one line on stderr."""
    signal.signal(signal.SIGTERM, _terminate)
    _prepare_streams()
    try:
        code = _run(app)
        sys.stdout.flush()
    except LlamatoolsError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        code = EXIT_SIGINT
    except Interrupted as error:
        print("terminated; nothing was left behind", file=sys.stderr)
        code = error.exit_code
    except MemoryError:
        print("not enough memory", file=sys.stderr)
        code = EXIT_NO_SPACE
    except BrokenPipeError:  # as of `llamatools inspect ... | head`: who reads no more wants to hear no more
        code = EXIT_SIGPIPE
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (so that the interpreter does not try again)
    except OSError as error:  # stdout is full; files are worded where they are opened
        print(f"stdout: {printable(error.strerror or str(error))}", file=sys.stderr)
        code = EXIT_NO_SPACE
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(code)
