"""`llamatools run --chat`: a conversation in a terminal, or, from a pipe, a line at a time."""

from __future__ import annotations

import io
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .printing import print_text

if TYPE_CHECKING:
    from llamatools_runtime import Chat, Sampler

FORGET = "/new"
HOW = f"Ctrl-C stops a reply. At an empty line, it ends, as Ctrl-D does. {FORGET} begins a new conversation."


def converse(
    model: Path,
    first: str,
    sampler: Sampler,
    *,
    format_name: str | None,
    system: str | None,
    n_tokens: int | None,
    max_tokens: int | None,
) -> None:
    """Talks until the user ends it. first: what is said before anything is asked for; empty for nothing."""
    import llamatools_runtime as runtime

    talk, how = runtime.open_chat(model, sampler, format_name=format_name, system=system, n_tokens=n_tokens)
    is_live = sys.stdin.isatty() and sys.stdout.isatty()
    print(f"format:    {how}", file=sys.stderr)
    print(f"context:   {talk.capacity} tokens", file=sys.stderr)
    if is_live:
        print(HOW, file=sys.stderr)
    if first:
        _reply(talk, first, max_tokens)
    for said in _typed() if is_live else _piped():
        if said.strip() == FORGET:
            talk.forget()
        elif said.strip():
            try:
                _reply(talk, said, max_tokens)
            except UsageError as error:
                if not is_live:
                    raise
                print(f"{error}. Say less, or {FORGET} to begin a new conversation", file=sys.stderr)


def _reply(talk: Chat, said: str, max_tokens: int | None) -> None:
    with _interruptible() as stopped:
        for piece in talk.say(said, max_tokens=max_tokens, stopped=stopped):
            print_text(piece)
    print()
    if talk.timing.ending == "context full":
        print(f"(context full: {talk.capacity} tokens. {FORGET} begins a new conversation)", file=sys.stderr)
    elif talk.timing.ending != "end of text":
        print(f"({talk.timing.ending})", file=sys.stderr)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, the first time, is only noted; what is given tells whether it was."""
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


def _piped() -> Iterator[str]:
    """The lines of stdin. What is not text in them becomes replacement characters."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    yield from sys.stdin


def _typed() -> Iterator[str]:
    """What the user types, and edits by the library readline; several lines where they were pasted at once."""
    import readline

    readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted waits for the Enter key, lines and all
    while True:
        try:
            lines = [input("> ")]
            while select.select([sys.stdin], [], [], 0)[0]:  # pasted into a terminal that does not mark it as such
                lines.append(input())
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if not readline.get_line_buffer():
                return
        else:
            yield "\n".join(lines)
