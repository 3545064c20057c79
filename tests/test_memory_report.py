"""What running takes of memory, against what others read from the system."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from llamatools_runtime import counters as counters_module
from llamatools_runtime import memory_report, report_memory
from llamatools_runtime.counters import counters
from llamatools_runtime.memory_report import files_of
from test_cli import Run, run  # noqa: F401
from tiny_llamas import TINY, random_weights, write_gguf

from llamatools.check.residency import residency
from llamatools.views import human_bytes

PAGE = mmap.PAGESIZE
MB = 1_000_000
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")


@pytest.fixture
def model(tmp_path: Path, sentencepiece_model: bytes) -> Path:
    vocabulary = tmp_path / "tokenizer.model"
    vocabulary.write_bytes(sentencepiece_model)
    return write_gguf(tmp_path / "m.gguf", random_weights(TINY), TINY, tokenizer=vocabulary)


def test_private_memory_is_counted_as_such() -> None:
    before = counters()
    with mmap.mmap(-1, 32 * MB, flags=mmap.MAP_PRIVATE) as taken:
        taken.write(b"\1" * (32 * MB))
        after = counters()
    assert after.rss_anon - before.rss_anon == pytest.approx(32 * MB, abs=2 * MB)
    assert after.pss - before.pss == pytest.approx(32 * MB, abs=2 * MB)
    assert after.rss_file - before.rss_file == pytest.approx(0, abs=2 * MB)


def test_faults_are_those_that_getrusage_counts() -> None:
    counters()  # so that nothing is done for the first time between the two
    ours, theirs = counters(), resource.getrusage(resource.RUSAGE_SELF)
    assert theirs.ru_minflt - 100 <= ours.minor_faults <= theirs.ru_minflt
    assert ours.major_faults == theirs.ru_majflt


@pytest.fixture
def toucher(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A file of 5 MB with an odd name, and a process that has mapped it and touched its first half."""
    path = tmp_path / "a 1 b\n(c).bin"
    path.write_bytes(b"\1" * (1280 * PAGE))
    program = (
        "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ);"
        f"m.madvise(mmap.MADV_RANDOM); sum(m[n] for n in range(0, {640 * PAGE}, {PAGE})); print(flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield path, process
    process.communicate(b"\n")


def test_mapped_pages_are_those_that_pmap_finds(toucher: tuple[Path, subprocess.Popen[bytes]]) -> None:
    path, process = toucher
    found = counters([path], process.pid)
    assert 640 * PAGE <= found.mapped <= 1280 * PAGE  # a fault enters neighbours, too
    assert found.mapped <= found.rss_file
    assert counters([path]).mapped == 0  # this process has not mapped it
    if shutil.which("pmap"):
        lines = subprocess.run(["pmap", "-x", str(process.pid)], capture_output=True, text=True, check=True).stdout
        (line,) = (line for line in lines.splitlines()[1:] if "(c).bin" in line)
        assert int(line.split()[2]) << 10 == found.mapped


def test_two_processes_share_what_both_have_mapped(toucher: tuple[Path, subprocess.Popen[bytes]]) -> None:
    path, process = toucher
    alone = counters([path], process.pid)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        assert sum(mapping[n] for n in range(0, len(mapping), PAGE)) == 1280
        together = counters([path], process.pid)
    assert together.mapped == alone.mapped
    assert alone.pss - together.pss == pytest.approx(alone.mapped / 2, abs=0.2 * MB)


def test_bytes_from_the_device(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with path.open("wb+") as file:
        file.write(os.urandom(3 * MB))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if residency(path).between(0, 3 * MB):
            pytest.skip("a file system that keeps its files in memory")
        before = counters().device_read
        os.pread(file.fileno(), 3 * MB, 0)
        assert counters().device_read - before == pytest.approx(3 * MB, abs=0.2 * MB)
        before = counters().device_read
        os.pread(file.fileno(), 3 * MB, 0)  # from the page cache now
        assert counters().device_read - before < 0.2 * MB


def test_what_is_reported_of_a_run(model: Path) -> None:
    report = report_memory(model, "the quick brown", max_tokens=12)
    assert list(report.looks) == ["before", "mapped", "token 1", "token 10"]
    facts = json.loads(json.dumps(report.as_dict()))
    assert len(facts["ids"]) == 12
    memory = facts["memory"]
    assert memory["schema"] == "llamatools.memory/1"
    stages = memory["stages"]
    whole = -(-model.stat().st_size // PAGE) * PAGE
    assert stages["before"]["mapped"] == 0
    assert stages["token 1"]["mapped"] <= stages["token 10"]["mapped"] <= whole
    assert stages["token 1"]["mapped"] > 0.8 * whole  # all matrices are computed with for every token
    assert stages["token 10"]["model_in_page_cache"] == whole  # it was just written
    for earlier, later in zip(stages.values(), list(stages.values())[1:], strict=False):
        assert earlier["minor_faults"] <= later["minor_faults"]
        assert earlier["device_read"] <= later["device_read"]
    assert stages.keys() == {"before", "mapped", "token 1", "token 10"}
    assert stages["before"].keys() - {"model_in_page_cache"} == memory["meanings"].keys()
    assert memory["seconds"]["map"] > 0
    assert memory["seconds"]["first_token"] >= memory["seconds"]["steady"] > 0
    assert [tensor["name"] for tensor in memory["tensors"]] == [tensor.name for tensor in report.layout.tensors]
    kinds = {kind["name"]: kind for kind in memory["kinds"]}
    assert (kinds["attn_q"]["n_tensors"], kinds["attn_q"]["nbytes"]) == (3, 3 * 64 * 64 * 4)
    assert kinds["attn_q"]["resident"]["token 1"] == kinds["attn_q"]["page_nbytes"]
    assert memory["estimate"]["weights"] == model.stat().st_size
    lines = list(report.lines())
    assert max(map(len, lines)) <= 80
    ours = memory["estimate"]["keys and values"] + memory["estimate"]["working memory"]
    assert lines[-1].split()[:3] == ["private", *human_bytes(ours).split()]


def test_every_counter_is_explained() -> None:
    names = [field.name for field in dataclasses.fields(counters_module.Counters)]
    assert sorted(names) == sorted(counters_module.MEANINGS) == sorted(memory_report.LABELS)


def test_a_short_text_has_fewer_stages(model: Path) -> None:
    report = report_memory(model, "the", max_tokens=1)
    assert list(report.looks) == ["before", "mapped", "token 1"]
    assert report.steady_seconds is None
    assert "  steady token        -   each after it, the mean of 0" in list(report.lines())
    none = report_memory(model, "the", max_tokens=0)
    assert (list(none.looks), none.first_seconds) == (["before", "mapped"], None)


def test_all_files_of_a_set_are_watched(tmp_path: Path) -> None:
    names = [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for name in names[:2]:
        (tmp_path / name).touch()
    assert [file.name for file in files_of(tmp_path / names[1])] == names[:2]
    assert files_of(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]


def test_on_the_command_line(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    arguments = ("run", model, "--prompt", "the", "--max-tokens", 2, "--memory-report")
    code, out, err = run(*arguments)
    assert (code, err.startswith("prompt: ")) == (0, True)
    for words in ("TIME, in seconds", "private (RssAnon)", "fair share (Pss)", "token_embd", "ESTIMATED by"):
        assert words in out
    code, out, _ = run(*arguments, "--json")
    assert (code, json.loads(out)["memory"]["schema"]) == (0, "llamatools.memory/1")
    code, _, err = run(*arguments, "--perplexity", model)
    assert (code, err) == (2, "--memory-report: it goes without --perplexity and --against\n")
    monkeypatch.setattr(counters_module.sys, "platform", "plan9")
    told = "what a process has in memory is told by Linux only, and this is plan9"
    assert run(*arguments) == (5, "", f"{told}\n")
