"""What Linux counts of a process's memory, of its faults, and of what it has read from a disk.

A file's page that is in memory lies there once, in the page cache, for everybody. A process that maps the file has it
in its own page table only after touching it, and loses it there when the system drops the page. So "how much memory
does it use" has several true answers, each with a name of its own; the sum that monitors call RSS is none of them.
Sources: proc(5); Linux, Documentation/filesystems/proc.rst.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamatools.errors import UnsupportedError

MINOR_FAULTS, MAJOR_FAULTS = 9, 11  # fields of /proc/PID/stat, from 0

MEANINGS = {
    "rss_anon": "RssAnon: private memory. Nobody shares it, and it cannot be dropped",
    "rss_file": "RssFile: pages of mapped files that the process has touched and that are in memory; "
    "others may use the same ones, and the system may drop them",
    "mapped": "the part of RssFile that is the model's (RssShmem on a RAM disk)",
    "pss": "Pss: private memory, and of every shared page the part that falls to this process; "
    "the only figure that can be added up over processes",
    "page_cache": "Cached in /proc/meminfo: files in the whole machine's memory, whoever read them",
    "device_read": "read_bytes in /proc/PID/io: what the process had fetched from a disk, read-ahead "
    "included; not what was in the page cache already, nor what comes from a RAM disk or a network",
    "minor_faults": "pages that were in memory and had only to be entered in the page table. Entering "
    "goes by neighbourhoods, by 4 KiB up to 2 MiB: the same bytes can show as one fault or as 65,536",
    "major_faults": "faults that waited for the disk. Read-ahead serves most pages before they are "
    "touched, so that few faults can stand for many bytes: see what was read",
}


@dataclass(frozen=True)
class Counters:
    """Of one process at one moment: bytes, and counts of faults. What each means stands in MEANINGS."""

    rss_anon: int
    rss_file: int
    mapped: int
    pss: int
    page_cache: int
    device_read: int
    minor_faults: int
    major_faults: int


def counters(files: Sequence[Path] = (), pid: int | None = None) -> Counters:
    """The counters of a process, by default of this one. files: whose mapped pages are counted apart.

    Raises UnsupportedError where there is no Linux to ask, OSError for a process that one may not look into.
    """
    if sys.platform != "linux":
        raise UnsupportedError(f"what a process has in memory is told by Linux only, and this is {sys.platform}")
    proc = Path("/proc", "self" if pid is None else str(pid))
    status = _fields(proc / "status")
    stat = (proc / "stat").read_text().rpartition(")")[2].split()  # from field 2 on: the name may hold anything
    return Counters(
        rss_anon=status["RssAnon"] << 10,
        rss_file=status["RssFile"] << 10,
        mapped=_mapped(proc, files),
        pss=_fields(proc / "smaps_rollup")["Pss"] << 10,
        page_cache=_fields(Path("/proc/meminfo"))["Cached"] << 10,
        device_read=_fields(proc / "io")["read_bytes"],
        minor_faults=int(stat[MINOR_FAULTS - 2]),
        major_faults=int(stat[MAJOR_FAULTS - 2]),
    )


def _fields(path: Path) -> dict[str, int]:
    """Lines such as "RssAnon:    1234 kB", by name; others are passed over."""
    pairs = (line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    words = ((name, rest.split()) for name, rest in pairs)
    return {name: int(rest[0]) for name, rest in words if rest and rest[0].isdecimal()}


def _mapped(proc: Path, files: Sequence[Path]) -> int:
    """Bytes of these files' pages that are in the process's page table."""
    names = {os.path.realpath(file).replace("\n", "\\012") for file in files}  # as seq_file escapes it
    nbytes, counts = 0, False
    for line in (proc / "smaps").read_text(errors="surrogateescape").splitlines() if names else ():
        words = line.split(None, 5)
        if not words[0].endswith(":"):  # the line that begins a mapping: addresses, ..., path
            counts = len(words) == 6 and words[5] in names
        elif counts and words[0] == "Rss:":
            nbytes += int(words[1]) << 10
    return nbytes
