"""Files that must not change while a model is computed from their mappings, and what happens when one does.

A mapped file that is written to changes the weights under the model's feet, and one that is truncated loses pages: the
operating system then ends the process that touches them by a signal, SIGBUS. So whoever computes calls `check` before
a result is shown, and a program calls `arm`, once, which turns that signal into one line and an exit code.

A file that is replaced by another of its name, as `mv`, `convert` and `quantize` do, stays mapped as it was until
nobody uses it any more. That is no change, and the model goes on as it was started.

On a network file system, what others change may show some seconds late.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llamatools.errors import EXIT_BAD_INPUT, FormatError

REMEDY = "Start again with a file that nothing writes to; to put another in its place, write it elsewhere and rename it"

# The handler of SIGBUS, in LLVM's language. The thread that touched the lost page is in the middle of something and may
# hold locks, so all it may do is to call functions such as `write` and `_exit` (POSIX, async-signal-safe). Nothing of
# Python's is one, and Python's own handlers run only after the instruction that can never be finished. Of several
# threads that touch lost pages the first says so; the others wait for the end.
HANDLER = f"""
@line = global ptr null
@length = global i64 0
@is_said = global i32 0
declare i64 @write(i32, ptr, i64)
declare void @_exit(i32)
define void @lost_page(i32 %signal) {{
  %was_said = atomicrmw xchg ptr @is_said, i32 1 seq_cst
  %is_first = icmp eq i32 %was_said, 0
  br i1 %is_first, label %say, label %wait
wait:
  %still = load volatile i32, ptr @is_said
  br label %wait
say:
  %line = load ptr, ptr @line
  %length = load i64, ptr @length
  %written = call i64 @write(i32 2, ptr %line, i64 %length)
  call void @_exit(i32 {EXIT_BAD_INPUT})
  unreachable
}}
"""


@dataclass(frozen=True)
class _Watched:
    """A mapped file as it was when it was mapped. file: a descriptor of its own."""

    path: Path
    file: int
    nbytes: int
    modified: int  # in nanoseconds

    def check(self) -> None:
        now = os.fstat(self.file)
        if now.st_size != self.nbytes:
            raise FormatError(
                f"it changed while it was in use: it had {self.nbytes} bytes and has {now.st_size} now",
                file=self.path,
                todo=REMEDY,
            )
        if now.st_mtime_ns != self.modified:
            raise FormatError("it was written to while it was in use", file=self.path, todo=REMEDY)


_watched: dict[int, _Watched] = {}  # by the identity of the mapping


def watch(mapping: mmap.mmap, path: Path, file: int) -> None:
    """Has a mapped file watched for as long as the mapping is in use. file: an open descriptor of it."""
    status = os.fstat(file)
    key = id(mapping)
    _watched[key] = _Watched(path, os.dup(file), status.st_size, status.st_mtime_ns)
    weakref.finalize(mapping, _forget, key)
    _prepare_line()


def check() -> None:
    """Raises FormatError when a mapped file is not what it was when it was mapped. Takes a microsecond or two a file.

    To be called after computing and before what was computed is shown.
    """
    for watched in tuple(_watched.values()):
        watched.check()


def arm() -> None:
    """From now on a page that is lost ends the program with one line and the exit code of bad input.

    For programs. It is not undone, and a library must not take such a decision for its user.
    """
    if hasattr(signal, "SIGBUS"):
        signal_ = ctypes.CDLL(None).signal  # which, unlike sigaction, is called alike everywhere
        signal_.argtypes, signal_.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        signal_(signal.SIGBUS, _handler().get_function_address("lost_page"))
        _prepare_line()


def _forget(key: int) -> None:
    os.close(_watched.pop(key).file)
    _prepare_line()


def _prepare_line() -> None:
    """Puts the line where the handler finds it. Which of several files it is about cannot be told."""
    if not _handler.cache_info().currsize:
        return
    files = " or ".join(str(watched.path) for watched in _watched.values())
    what = "a part of it is gone: it was truncated while it was in use, or its disk fails"
    lost = FormatError(what, file=files, todo=REMEDY)
    buffer = ctypes.create_string_buffer(f"{lost}\n".encode())
    length = ctypes.c_int64.from_address(_handler().get_global_value_address("length"))
    line = ctypes.c_void_p.from_address(_handler().get_global_value_address("line"))
    length.value = 0  # so that no moment has a length beyond its line
    line.value = ctypes.addressof(buffer)
    length.value = len(buffer) - 1
    _kept[:] = [buffer]


_kept: list[Any] = []  # what the handler points to


@cache
def _handler() -> Any:
    """The engine that holds the handler, for good."""
    import llvmlite.binding as llvm

    from llamatools.dtypes.compiled import engine

    engine().add_module(llvm.parse_assembly(HANDLER))
    engine().finalize_object()
    return engine()
