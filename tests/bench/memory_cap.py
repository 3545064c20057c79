"""A cap on the memory of one command: a memory cgroup below our own, version 1 or 2.

The cap counts private memory and those pages of files that the command itself brings into the page cache. Pages that
were there before belong to whoever read them; so a file must be dropped from the cache before it is mapped under a cap.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

LIMITS = {"cgroup": "memory.limit_in_bytes", "cgroup2": "memory.max"}  # by the type of file system
ENTER = 'echo $$ > "$0" && exec "$@"'  # for sh -c


class NoCapError(Exception):
    """No memory cgroup can be made here; says why."""


@contextlib.contextmanager
def memory_cap(nbytes: int) -> Iterator[list[str]]:
    """Yields what a command must begin with to run under the cap. Raises NoCapError."""
    group, limit = _made()
    try:
        (group / limit).write_text(str(nbytes))
        yield ["sh", "-c", ENTER, str(group / "cgroup.procs")]
    finally:
        _remove(group)


def kind_of_cap() -> str:
    """What the cap is made with here. Raises NoCapError."""
    group, limit = _made()
    _remove(group)
    return f"a memory cgroup, version {1 if limit == LIMITS['cgroup'] else 2} ({limit})"


def _made() -> tuple[Path, str]:
    tried = []
    for parent, limit in _parents():
        group = parent / f"llamatools-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            tried.append(str(error))
            continue
        if (group / limit).exists():
            return group, limit
        tried.append(f"{group / limit} does not come into being")
        group.rmdir()
    raise NoCapError("; ".join(tried) or "no cgroup file system is mounted")


def _parents() -> Iterator[tuple[Path, str]]:
    """Folders in which a group may be made, and the file that its limit is written to."""
    own = {}  # our group, by controller; "" is version 2
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path.lstrip("/"))
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in own:
            yield Path(where, own["memory"]), LIMITS[kind]
        elif kind == "cgroup2" and "" in own:
            yield Path(where, own[""]), LIMITS[kind]
            yield Path(where, own[""]).parent, LIMITS[kind]  # a group of version 2 with processes has none below


def _remove(group: Path) -> None:
    for _ in range(100):  # what ran in it may take a moment to be gone
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise OSError(f"{group} cannot be removed: something still runs in it")
