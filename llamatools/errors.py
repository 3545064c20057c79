"""What can go wrong: one exception tree, one wording, one table of exit codes.

Every error that a user can cause is a `LlamatoolsError`. It is raised with facts (what is wrong, where, what to do) and
worded here: `<file>: <where>: <what>. <what to do>`. Whoever opens a file attaches its path, once, with `in_file`.

A reader that can go on after an error tells it to a `Report`. `refuse` raises it, so that reading ends there; a list's
`append` collects it, so that a damaged file is shown as far as it makes sense.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from typing import NoReturn

# Exit codes of the command line; documented in docs/reference/exit-codes.md.
EXIT_SOUND = 0
EXIT_FINDINGS = 1
EXIT_USAGE = 2
EXIT_BAD_INPUT = 3
EXIT_NO_SPACE = 4
EXIT_UNSUPPORTED = 5
EXIT_SIGINT = 130
EXIT_SIGPIPE = 141
EXIT_SIGTERM = 143


class LlamatoolsError(Exception):
    """An error with a one-line account.

    what: the fact that is wrong, with both numbers where there are two.
    where: the place inside the file (a tensor, a key, a byte).
    todo: what the user can do about it, as a sentence without its full stop.
    file: the file; usually attached by `in_file`.
    code: its short name as a finding (check/findings.py). span: the bytes of the file that it concerns.
    """

    exit_code = EXIT_BAD_INPUT
    code = "damaged"

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        todo: str | None = None,
        file: str | PathLike[str] | None = None,
        code: str | None = None,
        span: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.todo = todo
        self.file = None if file is None else fspath(file)
        self.code = code or type(self).code
        self.span = span

    def __str__(self) -> str:
        account = ": ".join(part for part in (self.file, self.where, self.what) if part)
        return printable(f"{account}. {self.todo}" if self.todo else account)


class FormatError(LlamatoolsError):
    """A file is not what it must be: damaged, truncated, hostile, or of another kind."""


class UsageError(LlamatoolsError):
    """The request itself cannot be met: an unknown option value, a destination in the way."""

    exit_code = EXIT_USAGE


class UnsupportedError(LlamatoolsError):
    """The file is sound but llamatools has no support for what it holds."""

    exit_code = EXIT_UNSUPPORTED
    code = "unsupported"


class SpaceError(LlamatoolsError):
    """Not enough disk or memory."""

    exit_code = EXIT_NO_SPACE


class Interrupted(BaseException):
    """SIGTERM arrived. Not an Exception, like KeyboardInterrupt, so that only clean-up code sees it on its way."""

    exit_code = EXIT_SIGTERM


_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM}


@contextmanager
def in_file(path: str | PathLike[str]) -> Iterator[None]:
    """Attaches `path` to any LlamatoolsError that leaves the block without one, and words operating system errors.

    An error about an option of the command line (`--align`) stays without: that is no place in a file.
    Raises LlamatoolsError: FormatError for a file that cannot be read, SpaceError for a full disk.
    """
    try:
        yield
    except LlamatoolsError as error:
        if error.file is None and not (error.where or "").startswith("--"):
            error.file = fspath(path)
        raise
    except OSError as error:
        kind = SpaceError if error.errno in _NO_SPACE else FormatError
        reason = error.strerror or str(error)
        raise kind(reason[:1].lower() + reason[1:], file=path) from error


Report = Callable[[LlamatoolsError], None]


def refuse(error: LlamatoolsError) -> NoReturn:
    """The report of a strict reader: what is wrong is raised."""
    raise error


def naming(path: str | PathLike[str], report: Report) -> Report:
    """`report`, but told of errors that carry the path of their file."""

    def tell(error: LlamatoolsError) -> None:
        if error.file is None:
            error.file = fspath(path)
        report(error)

    return tell


def printable(text: str) -> str:
    """`text` with control characters, escape codes and undecodable bytes written as escapes, safe for a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
