"""A file that appears under its name only when it is whole: written beside it, synced, then renamed."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from collections.abc import Iterable
from contextlib import suppress
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
        self._part = self.destination.with_name(f".{self.destination.name}.{os.getpid()}.{os.urandom(4).hex()}.part")
        self._replaced = self._part.with_suffix(".old.part")  # another name of what is replaced
        self._replaces = False
        self._identity: tuple[int, int] | None = None  # of the sealed file: device and inode
        self._fd = -1

    def __enter__(self) -> Draft:
        try:
            with in_file(self.named):
                _require_space(self.destination.parent, self.size)
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
                self._fd = os.open(self._part, flags, 0o666)
                _reserve(self._fd, self.size)
            return self
        except BaseException:  # an interruption may come between any two lines
            self.discard()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Writes all of `data` (bytes) at `offset`. Safe for threads that write different places."""
        with in_file(self.named):
            while len(data):
                n = os.pwrite(self._fd, data, offset)
                data, offset = data[n:], offset + n

    def publish(self) -> None:
        """Syncs the file and gives it its name. After an error nothing is published and a retry is not attempted."""
        self.seal()
        self.give_name()

    def seal(self) -> None:
        """Syncs the file, which is then complete but for its name."""
        with in_file(self.named):
            os.fsync(self._fd)
            self._replaces = self.force and self.destination.exists()
            if self._replaces:
                os.fchmod(self._fd, stat.S_IMODE(self.destination.stat().st_mode))
            self._identity = _identity(os.fstat(self._fd))
            self._close()

    def give_name(self) -> None:
        """Gives the sealed file its name, for good."""
        with in_file(self.named):
            self._rename()
            folder = os.open(self.destination.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def take_back(self) -> None:
        """Undoes `give_name`, if it came as far as the name."""
        with in_file(self.named):
            if self.destination.exists() and _identity(self.destination.stat()) == self._identity:
                if self._replaced.exists():
                    os.replace(self._replaced, self.destination)
                elif not self._replaces:  # else what was there cannot be put back
                    self.destination.unlink()

    def _rename(self) -> None:
        if self.force:
            with suppress(OSError):  # nothing to replace, or a file system without links
                os.link(self.destination, self._replaced)
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

    def _close(self) -> None:
        fd, self._fd = self._fd, -1  # first forgotten: an interruption must not have it closed twice
        os.close(fd)

    def discard(self) -> None:
        """Removes what lies beside the destination; after `publish` that is at most what was replaced."""
        if self._fd >= 0:
            self._close()
        self._part.unlink(missing_ok=True)
        self._replaced.unlink(missing_ok=True)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


class Drafts:
    """A context manager around the drafts of files that belong together, one or more: all of them appear, or none.

    Raises what Draft raises.
    """

    def __init__(self, files: Iterable[tuple[Path, int]], *, force: bool = False) -> None:
        self._drafts = [Draft(path, size, force=force) for path, size in files]

    def __enter__(self) -> Drafts:
        first = self._drafts[0]
        with in_file(first.named):
            _require_space(first.destination.parent, sum(draft.size for draft in self._drafts))
        try:
            for draft in self._drafts:
                draft.__enter__()
            return self
        except BaseException:
            self._discard()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def __getitem__(self, n: int) -> Draft:
        return self._drafts[n]

    def publish(self) -> None:
        """Syncs all drafts and gives them their names, the first only once every one of them is on the disk.

        Where a name cannot be given, those given before are taken back, and what they replaced is there again.
        """
        for draft in self._drafts:
            draft.seal()
        try:
            for draft in self._drafts:
                draft.give_name()
        except BaseException:
            for draft in self._drafts:
                draft.take_back()
            raise

    def _discard(self) -> None:
        for draft in self._drafts:
            draft.discard()


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


def _require_space(folder: Path, size: int) -> None:
    free = os.statvfs(folder)
    available = free.f_bavail * free.f_frsize
    if size > available:
        raise SpaceError(f"needs {size} bytes of disk, but only {available} are free", todo="Make room first")


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
