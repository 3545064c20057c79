"""How much more memory this process can have: what the machine, its control groups and its own limits leave."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes, swap included; None where the operating system does not say."""
    return min((*_of_machine(), *_of_control_groups(), *_of_limits()), default=None)


def _of_machine() -> Iterator[int]:
    """What could be had without ending anything: free memory, and pages of files, which can be read again."""
    with suppress(OSError):
        kib = dict(re.findall(r"(MemAvailable|SwapFree): +(\d+)", (PROC / "meminfo").read_text()))
        if "MemAvailable" in kib:
            yield 1024 * sum(map(int, kib.values()))


def _of_control_groups() -> Iterator[int]:
    """What is left below the limit of this process's group and of each group around it (version 2)."""
    with suppress(OSError):
        found = re.search(r"^0::/(.*)$", (PROC / "self" / "cgroup").read_text(), re.MULTILINE)
        group = CGROUPS / found[1] if found else CGROUPS
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # the outermost has no limit; a limit may be "max"
                limit = int((folder / "memory.max").read_text())
                of_files = re.findall(r"^(?:in)?active_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                yield limit - int((folder / "memory.current").read_text()) + sum(map(int, of_files))


def _of_limits() -> Iterator[int]:
    """What is left of the address space that `ulimit -v` allows."""
    with suppress(ImportError, OSError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - int((PROC / "self" / "statm").read_text().split()[0]) * resource.getpagesize()
