"""Drafts: whole under their name, or not there at all."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import pytest

from llamatools import draft as draft_module
from llamatools.draft import Draft, check_destination
from llamatools.errors import SpaceError, UsageError


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_published_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with Draft(target, 10) as draft:
        draft.write(b"world", 5)
        assert not target.exists()
        draft.write(b"hello", 0)
        draft.publish()
    assert target.read_bytes() == b"helloworld"
    assert leftovers(tmp_path) == ["model"]


def test_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with Draft(tmp_path / "model", 1) as draft:
            draft.publish()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o640


def test_replacing_keeps_the_mode_and_the_symbolic_link(tmp_path: Path) -> None:
    target, link = tmp_path / "model", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to("model")
    with Draft(link, 3, force=True) as draft:
        draft.write(b"new", 0)
        draft.publish()
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Draft(tmp_path / "model", 1 << 20):
        raise ZeroDivisionError
    assert leftovers(tmp_path) == []


def test_an_interruption_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), Draft(tmp_path / "model", 9, force=True) as draft:
        draft.write(b"new", 0)
        raise KeyboardInterrupt
    assert leftovers(tmp_path) == ["model"]
    assert (tmp_path / "model").read_bytes() == b"old"


def test_does_not_replace_what_appeared_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model: exists already. Add --force to replace it"):
        with Draft(tmp_path / "model", 3) as draft:
            (tmp_path / "model").write_bytes(b"theirs")
            draft.publish()
    assert leftovers(tmp_path) == ["model"]
    assert (tmp_path / "model").read_bytes() == b"theirs"


@pytest.mark.parametrize("appeared", [True, False])
def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appeared: bool) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    with Draft(tmp_path / "model", 3) as draft:
        draft.write(b"new", 0)
        if appeared:
            (tmp_path / "model").write_bytes(b"theirs")
            with pytest.raises(UsageError, match="exists already"):
                draft.publish()
        else:
            draft.publish()
    assert leftovers(tmp_path) == ["model"]
    assert (tmp_path / "model").read_bytes() == (b"theirs" if appeared else b"new")


def test_too_little_disk_is_said_before_the_work(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    available = free.f_bavail * free.f_frsize
    size = available + (1 << 40)
    with pytest.raises(SpaceError, match=rf"model: needs {size} bytes of disk, but only \d+ are free. Make room first"):
        Draft(tmp_path / "model", size).__enter__()
    assert leftovers(tmp_path) == []


FULL_DISK = """
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from llamatools.draft import Draft
from llamatools.errors import SpaceError
try:
    with Draft(Path(sys.argv[1]), 1 << 20) as draft:
        draft.publish()
except SpaceError as error:
    sys.exit(str(error))
"""


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """A limit on the size of files makes the kernel refuse, as a full disk does."""
    target = tmp_path / "model"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(target)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == f"{target}: file too large"
    assert leftovers(tmp_path) == []


def test_synced_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a name must never lead to data that were not synced: the order of calls is the proof."""
    calls: list[str] = []

    def recorded(name: str, real):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            calls.append(name)
            return real(*args, **kwargs)

        return call

    for name in ("pwrite", "fsync", "link", "unlink"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    with Draft(tmp_path / "model", 3) as draft:
        draft.write(b"new", 0)
        draft.publish()
    assert [call for call in calls if call != "unlink"] == ["pwrite", "fsync", "link", "fsync"]


def test_a_failed_sync_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(Exception, match="model: input/output error"), Draft(tmp_path / "model", 3) as draft:
        draft.publish()
    assert leftovers(tmp_path) == []


def test_destinations_that_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    (tmp_path / "same").hardlink_to(source)
    os.mkfifo(tmp_path / "fifo")
    check_destination(tmp_path / "new", [source], force=False)
    check_destination(tmp_path / "same", [tmp_path / "fifo"], force=True)
    for name, force, message in (
        ("no/model", True, "its folder does not exist"),
        ("fifo", True, "is there already and is not a regular file"),
        ("same", True, "is both source and destination. Name another destination"),
        ("same", False, "is both source and destination"),
    ):
        with pytest.raises(UsageError, match=message):
            check_destination(tmp_path / name, [source], force=force)
    with pytest.raises(UsageError, match=r"same: exists already. Add --force to replace it"):
        check_destination(tmp_path / "same", [], force=False)


class Stopper:
    """A trace function that raises KeyboardInterrupt before the n-th line of draft.py, the clean-up's own aside."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame: FrameType, event: str, _: object) -> Stopper | None:
        code = frame.f_code
        if code.co_filename != draft_module.__file__ or code.co_name in ("_discard", "__exit__", "__init__"):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("force", [True, False])
def test_an_interruption_before_any_line_leaves_nothing(tmp_path: Path, force: bool) -> None:
    n_stopped = 0
    for n in range(1, 100):
        stopper = Stopper(n)
        sys.settrace(stopper)
        try:
            with Draft(tmp_path / "model", 3, force=force) as draft:
                draft.write(b"abc", 0)
                draft.publish()
        except KeyboardInterrupt:
            n_stopped += 1
        finally:
            sys.settrace(None)
        assert os.listdir(tmp_path) in ([], ["model"]), n
        if stopper.left > 0:
            break
        (tmp_path / "model").unlink(missing_ok=True)
    assert n_stopped > 20
    assert (tmp_path / "model").read_bytes() == b"abc"


def test_space_is_reserved_on_a_disk_and_not_on_a_ram_disk(tmp_path: Path) -> None:
    ram_disk = Path("/dev/shm")
    kinds = {fields[1]: fields[2] for fields in map(str.split, Path("/proc/mounts").read_text().splitlines())}
    if kinds.get(str(ram_disk)) != "tmpfs":
        pytest.skip("no RAM disk at /dev/shm")
    with TemporaryDirectory(dir=ram_disk) as folder:
        with Draft(Path(folder) / "model.gguf", 1 << 20):
            (part,) = Path(folder).iterdir()
            assert (part.stat().st_size, part.stat().st_blocks) == (1 << 20, 0)
    with Draft(tmp_path / "model.gguf", 1 << 20):
        (part,) = tmp_path.iterdir()
        on_disk = os.stat(tmp_path).st_dev != os.stat(ram_disk).st_dev
        assert part.stat().st_size == 1 << 20
        assert part.stat().st_blocks * 512 >= 1 << 20 or not on_disk
