"""What memory is left, from files as Linux writes them, and of this very process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from llamatools_runtime import room

MEMINFO = "MemTotal:  1000 kB\nMemFree:  100 kB\nMemAvailable:     600 kB\nSwapTotal:  900 kB\nSwapFree:    50 kB\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("proc/self", "cgroup/outer/inner"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(room, "PROC", tmp_path / "proc")
    monkeypatch.setattr(room, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(room, "_of_limits", lambda: [])
    return tmp_path


def test_of_the_machine(machine: Path) -> None:
    assert room.available_memory() is None
    (machine / "proc/meminfo").write_text(MEMINFO)
    assert room.available_memory() == 650 * 1024


def test_of_control_groups(machine: Path) -> None:
    (machine / "proc/meminfo").write_text(MEMINFO)
    (machine / "proc/self/cgroup").write_text("0::/outer/inner\n")
    for group, limit, current, files in (("outer", "5000", "3000", (400, 100)), ("outer/inner", "max", "10", (0, 0))):
        folder = machine / "cgroup" / group
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_file {files[0]}\nactive_file {files[1]}\nslab 9\n")
    assert room.available_memory() == 5000 - 3000 + 500
    (machine / "cgroup/outer/inner/memory.max").write_text("1000\n")
    assert room.available_memory() == 1000 - 10


def test_of_this_process() -> None:
    pytest.importorskip("resource")
    limit = 1 << 33
    code = f"""if True:
        import resource, llamatools_runtime.room as room
        resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
        print(room.available_memory())"""
    left = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0 < left < limit
