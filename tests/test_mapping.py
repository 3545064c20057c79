"""The benchmark of mapping: it runs from end to end on a small model, and its page is that of its figures."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny_llamas import TINY, random_weights, write_gguf

from llamatools.check.residency import residency

ROOT = Path(__file__).parents[1]
EXPLANATION = ROOT / "docs" / "explanation"
PLOTS = {"memory-start.svg", "memory-processes.svg", "memory-cap.svg", "memory-read.svg"}
sys.path.insert(0, str(ROOT / "tests" / "bench"))

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")


@linux
def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mapping
    import memory_cap

    for name, value in {"PERCENTS": (10000, 40), "N_PROCESSES": 2, "ALIGNMENTS": (32, 4096)}.items():
        monkeypatch.setattr(mapping, name, value)
    model = write_gguf(tmp_path / "m.gguf", random_weights(TINY), TINY)
    size = model.stat().st_size
    try:
        mapping.make_cold(model)
    except SystemExit:
        pytest.skip("a file system that keeps its files in memory")
    found = json.loads(json.dumps(mapping.experiment(model, model, runs=1)))

    ways = {(way["by"], way["state"]): way for way in found["start"]}
    for by in ("map", "read"):
        assert ways[by, "cold"]["cached_before"] == 0
        assert ways[by, "cold"]["device_read"] > 0.8 * size
        assert ways[by, "warm"]["cached_before"] >= size
    assert (ways["read", "warm"]["mapped"], found["model"]["size"]) == (0, size)
    assert ways["map", "warm"]["mapped"] > 0.8 * size
    assert [row["n"] for row in found["processes"]["map"]] == [1, 2]
    assert found["processes"]["map"][1]["pss"] < found["processes"]["map"][1]["rss"]
    assert {(row["alignment"], row["state"]) for row in found["alignments"]} == {
        (alignment, state) for alignment in (32, 4096) for state in ("cold", "warm")
    }
    assert not list(tmp_path.glob(".*"))  # the copies are gone
    try:
        memory_cap.kind_of_cap()
    except memory_cap.NoCapError:
        assert found["caps"]["how"] is None
    else:
        # The model is so small that what a process has in the kernel counts, too: with 40 % it may be killed.
        assert [point["outcome"] for point in found["caps"]["points"]][:2] == ["ran"] * 2

    mapping.write_page(found, tmp_path)
    check_page(tmp_path)


def test_a_page_where_nothing_caps(tmp_path: Path) -> None:
    from mapping_page import write_page

    found = figures()
    found["caps"] = {"how": None, "why": "no cgroup file system is mounted", "points": []}
    write_page(found, tmp_path)
    page = check_page(tmp_path)
    assert "Not measured here: no cap can be set (no cgroup file system is mounted)." in page
    assert "memory-cap.svg" not in page


def test_the_page_is_that_of_its_figures(tmp_path: Path) -> None:
    from mapping_page import write_page

    write_page(figures(), tmp_path)
    check_page(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in EXPLANATION.glob("memory*")}, "run it with --from"
    assert written.keys() == {"memory.md", "memory.json"} | PLOTS


def test_a_process_that_needs_more_than_its_cap_is_ended() -> None:
    from memory_cap import NoCapError, memory_cap

    try:
        with memory_cap(64 << 20) as prefix:
            codes = [
                subprocess.run(
                    [*prefix, sys.executable, "-c", f"bytearray(b'1') * ({n} << 20)"], check=False
                ).returncode
                for n in (16, 200)
            ]
    except NoCapError:
        pytest.skip("no memory cgroup can be made here")
    assert codes == [0, -9]


def test_what_is_on_a_disk_can_be_made_cold_and_warm(tmp_path: Path) -> None:
    import mapping

    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    try:
        mapping.make_cold(path)
    except SystemExit:
        pytest.skip("a file system that keeps its files in memory")
    assert residency(path).between(0, 1 << 20) == 0
    mapping.make_warm(path)
    assert residency(path).between(0, 1 << 20) == 1 << 20
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[-1] == 0  # touched
        with pytest.raises(SystemExit, match="it stays in the page cache"):
            mapping.make_cold(path)


def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXPLANATION / "memory.json").read_text())
    return found


def check_page(folder: Path) -> str:
    """Everything was filled in, and every plot is XML."""
    page = (folder / "memory.md").read_text()
    assert "$" not in page
    assert page.count("\n- **") == 4  # verdicts
    for plot in folder.glob("*.svg"):
        assert len(list(ElementTree.fromstring(plot.read_text()).iter())) > 20
    return page
