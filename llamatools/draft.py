"""A file that appears under its name only when it is whole: written beside it, synced, then renamed."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from .errors import SpaceError, UsageError, in_file


class Draft:
    """A context manager around the temporary sibling of a file to be written.

    Disk space is reserved on entry (on a RAM disk, only looked for). Leaving without `publish` (an error, an
    interruption) removes the sibling; the destination is then untouched. Only a killed process leaves a `.NAME.*.part`
    behind, which no reader takes for a model, since the header is written last.

    Raises UsageError where the destination cannot be replaced, SpaceError for a full disk.
    """

    def __init__(self, destination: Path, size: int, *, force: bool = False) -> None:
        self.destination = Path(os.path.realpath(destination))  # a symbolic link stays one
        self.named = destination
        self.size = size
        self.force = force
        self._part = self.destination.with_name(f".{self.destination.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
        self._fd = -1

    def __enter__(self) -> Draft:
        try:
            with in_file(self.named):
                self._check_space()
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
                self._fd = os.open(self._part, flags, 0o666)
                _reserve(self._fd, self.size)
            return self
        except BaseException:  # an interruption may come between any two lines
            self._discard()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Writes all of `data` (bytes) at `offset`. Safe for threads that write different places."""
        with in_file(self.named):
            while len(data):
                n = os.pwrite(self._fd, data, offset)
                data, offset = data[n:], offset + n

    def publish(self) -> None:
        """Syncs the file and gives it its name. After an error nothing is published and a retry is not attempted."""
        with in_file(self.named):
            os.fsync(self._fd)
            if self.force and self.destination.exists():
                os.fchmod(self._fd, stat.S_IMODE(self.destination.stat().st_mode))
            self._close()
            self._rename()
            folder = os.open(self.destination.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _rename(self) -> None:
        if self.force:
            os.replace(self._part, self.destination)
            return
        try:
            os.link(self._part, self.destination)  # unlike rename, refuses to replace what appeared meanwhile
        except FileExistsError:
            raise UsageError(*EXISTS) from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if self.destination.exists():
                raise UsageError(*EXISTS) from None
            os.replace(self._part, self.destination)  # a file system without links
            return
        self._part.unlink()

    def _check_space(self) -> None:
        free = os.statvfs(self.destination.parent)
        available = free.f_bavail * free.f_frsize
        if self.size > available:
            raise SpaceError(f"needs {self.size} bytes of disk, but only {available} are free", todo="Make room first")

    def _close(self) -> None:
        fd, self._fd = self._fd, -1  # first forgotten: an interruption must not have it closed twice
        os.close(fd)

    def _discard(self) -> None:
        """Removes the sibling, if it is there; after `publish` it is not."""
        if self._fd >= 0:
            self._close()
        self._part.unlink(missing_ok=True)


EXISTS = ("exists already. Add --force to replace it",)


def check_destination(destination: Path, sources: Iterable[Path], *, force: bool) -> None:
    """Refuses a destination that is a source, no regular file, or there already, before any work is done.

    Raises UsageError, or FormatError for a folder that cannot be looked into.
    """
    with in_file(destination):
        if not destination.parent.is_dir():
            raise UsageError("its folder does not exist")
        if not destination.exists():
            return
        if not destination.is_file():
            raise UsageError("is there already and is not a regular file")
        for source in sources:
            if destination.samefile(source):
                raise UsageError("is both source and destination", todo="Name another destination")
        if not force:
            raise UsageError(*EXISTS)


TMPFS = 0x01021994  # linux/magic.h


def _reserve(fd: int, size: int) -> None:
    """Reserves `size` bytes of disk for the file.

    By fallocate itself: glibc's posix_fallocate writes every block on file systems that lack it. Not on a RAM disk,
    which would clear every page for it, one thread at a time: as much work as writing them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(libc, "fallocate64", None)
    if fallocate is not None and size and not _is_in_memory(libc, fd):
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        while fallocate(fd, 0, 0, size):
            code = ctypes.get_errno()
            if code in (errno.EOPNOTSUPP, errno.ENOSYS):
                break
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
    os.ftruncate(fd, size)


def _is_in_memory(libc: ctypes.CDLL, fd: int) -> bool:
    """Whether the file lies on a Linux RAM disk, by the first field of struct statfs."""
    facts = (ctypes.c_long * 64)()
    fstatfs = getattr(libc, "fstatfs", None)
    return sys.platform == "linux" and fstatfs is not None and fstatfs(fd, facts) == 0 and facts[0] == TMPFS
