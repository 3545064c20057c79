"""The strip, the page and what is in memory: against gguf-py's offsets, fincore's pages and tracemalloc's peak."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tracemalloc
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import STRING, Tensor, build, key, scalar
from llama_files import data_start, llama, written
from llamatools_runtime import generation, weights
from llamatools_runtime.cache import Cache
from llamatools_runtime.load import load
from test_cli import Run, run  # noqa: F401 (a fixture)
from tiny_llamas import TINY, random_weights, write_gguf

import llamatools
from llamatools import strip
from llamatools.check import memory, residency
from llamatools.check.extents import extents
from llamatools.errors import FormatError
from llamatools.page import page

PAGE = residency.PAGE
START = data_start()


# ---- what lies where ----


def kinds(path: Path) -> list[tuple[int, int, str]]:
    layout = llamatools.inspect(path)
    return [(part.start, part.stop, part.kind) for part in extents(layout, 0)]


def test_every_byte_is_accounted_for(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_weights(TINY), TINY, matrices=gguf.GGMLQuantizationType.Q8_0)
    reader = gguf.GGUFReader(path)
    found = kinds(path)
    assert found[0][0] == 0
    assert found[-1][1] == path.stat().st_size
    assert all(before[1] == after[0] for before, after in pairwise(found))
    theirs = sorted((int(t.data_offset), int(t.data_offset) + int(t.n_bytes)) for t in reader.tensors)
    assert [part[:2] for part in found if part[2] == "tensor"] == theirs


@pytest.mark.parametrize(
    ("tensors", "options", "expected"),
    [
        ([Tensor("a"), Tensor("b", offset=160)], {}, [(0, 128, "tensor"), (128, 160, "hole")]),
        ([Tensor("a"), Tensor("b", offset=96)], {}, [(0, 96, "tensor"), (96, 128, "overlap"), (128, 224, "tensor")]),
        ([Tensor("a", ne=(9,)), Tensor("b")], {}, [(0, 36, "tensor"), (36, 64, "padding"), (64, 192, "tensor")]),
        ([Tensor("a")], {"cut": 28}, [(0, 100, "tensor"), (100, 128, "missing")]),
    ],
    ids=["hole", "overlap", "padding", "truncated"],
)
def test_what_is_no_weight(
    tensors: list[Tensor], options: dict[str, int], expected: list[tuple[int, int, str]], tmp_path: Path
) -> None:
    keys = [key("general.architecture", scalar(STRING, "llama"))]
    start = len(build(keys, tensors, data=False))
    found = kinds(written(tmp_path / "m.gguf", build(keys, tensors, **options)))
    shifted = [(a - start, b - start, kind) for a, b, kind in found if a >= start]
    assert shifted[: len(expected)] == expected


def test_behind_the_last_tensor_and_behind_a_broken_header(tmp_path: Path) -> None:
    end = START + 42_368
    assert kinds(written(tmp_path / "m.gguf", llama() + bytes(100)))[-1] == (end, end + 100, "trailing")
    assert kinds(written(tmp_path / "m.gguf", llama()[:300])) == [(0, 300, "header")]


# ---- the strip ----


def cells(text: str) -> str:
    """The cells of all rows, one after the other."""
    return "".join(line[16:].ljust(64) for line in text.splitlines() if line[:14].strip().isdigit())


def test_the_strip_is_to_scale(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = write_gguf(tmp_path / "m.gguf", random_weights(TINY), TINY)
    code, out, err = run("inspect", path, "--layout")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    size = path.stat().st_size
    cell = 2 ** int(np.ceil(np.log2(size / (16 * 64))))
    assert f"a cell is {cell:,} bytes" in out
    drawn = cells(out)
    assert len(drawn.rstrip()) == -(-size // cell)
    for tensor in gguf.GGUFReader(path).tensors:
        first, last = int(tensor.data_offset) // cell, int(tensor.data_offset + tensor.n_bytes - 1) // cell
        assert set(drawn[first + 1 : last]) <= {"a"}  # whole cells
        if tensor.n_bytes >= 2 * cell:
            assert drawn[first + 1] == "a"


def test_a_strip_of_some_tensors(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = write_gguf(tmp_path / "m.gguf", random_weights(TINY), TINY)
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_q.weight")  # 16 KiB
    _, out, _ = run("inspect", path, "--layout", "--match", r"^blk\.1\.attn_q\.")
    rows = [line for line in out.splitlines() if line[:14].strip().isdigit()]
    start, cell = int(rows[0][:14]), 16 if "a cell is 16 bytes" in out else 32
    drawn = cells(out)
    assert drawn.index("A") == (tensor.data_offset - start) // cell
    assert len(drawn.strip()) == -(-tensor.n_bytes // cell) + bool(tensor.data_offset % cell)
    marked = {int(row[:14]) for row in rows if row[14] == "|"}
    assert marked == {int(row[:14]) for row in rows if int(row[:14]) % 4096 == 0}
    assert marked


def test_faults_are_shown_however_small(run: Run, tmp_path: Path) -> None:  # noqa: F811
    overlapping = Tensor("b", ne=(4096,), offset=(1 << 20) - 32)
    large = [Tensor("a", ne=(1 << 18,)), overlapping, Tensor("c\x1b[2J", offset=(1 << 20) + 16384)]
    path = written(tmp_path / "m.gguf", build([key("general.architecture", scalar(STRING, "llama"))], large))
    code, out, _ = run("inspect", path, "--layout")
    assert code == 1
    assert "X" in cells(out)
    assert "!" in cells(out)
    assert "\x1b" not in out


def test_colours_are_for_terminals_that_want_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console
    from rich.text import Text

    layout = llamatools.inspect(written(tmp_path / "m.gguf", llama()))
    for line in strip.lines(layout):
        Console(file=open(os.devnull, "w")).print(Text.assemble(*line))  # noqa: SIM115 (styles that rich knows)


# ---- in memory ----


def test_pages_in_memory(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "m.gguf"
    path.write_bytes(build([key("general.architecture", scalar(STRING, "llama"))], [Tensor("a", ne=(1 << 20,))]))
    layout = llamatools.inspect(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # so that nothing is read ahead
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = residency.residency(path)
        if before.between(0, 1 << 30):
            pytest.skip("a file system that keeps its files in memory")
        for n in (3, 4, 100, 511):
            os.pread(file.fileno(), 10, n * PAGE)
        found = residency.residency(path)
    assert found.starts.tolist() == [3 * PAGE, 100 * PAGE, 511 * PAGE]
    assert found.stops.tolist() == [5 * PAGE, 101 * PAGE, 512 * PAGE]
    assert found.pages(layout.tensors[0]) == (1025, 4)  # it begins within a page
    edges = np.array([0, 4 * PAGE, 8 * PAGE, 600 * PAGE], np.int64)
    assert found.shares(edges).tolist() == [0.25, 0.25, 2 / 592]
    if shutil.which("fincore"):
        told = subprocess.run(["fincore", "-bnr", "-o", "RES", path], capture_output=True, text=True, check=True)
        assert found.between(0, path.stat().st_size + PAGE) == int(told.stdout)


def test_windows_of_a_file_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "f", bytes(10 * PAGE + 1))
    monkeypatch.setattr(residency, "WINDOW", 4 * PAGE)
    found = residency.residency(path)
    assert (found.starts.tolist(), found.stops.tolist()) == ([0], [11 * PAGE])
    assert residency.residency(written(tmp_path / "empty", b"")).starts.size == 0


def test_a_file_that_shrinks_while_it_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "f", bytes(PAGE))
    monkeypatch.setattr(residency, "_windows", lambda size: [(0, size + PAGE)])  # what it had when its size was read
    with pytest.raises(FormatError, match=f"^{path}: it shrank while its pages were asked for$"):
        residency.residency(path)


def test_residency_in_every_view(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = written(tmp_path / "m.gguf", llama())  # just written, so all of it is there
    _, out, _ = run("inspect", path, "--residency", "--match", "attn_q")
    assert out.split()[:10] == [
        "tensor",
        "dtype",
        "pages",
        "in",
        "memory",
        "part",
        "blk.0.attn_q.weight",
        "F32",
        "2",
        "2",
    ]
    assert out.endswith(f"are in the page cache (100.0%), in pages of {PAGE}\n")
    facts = json.loads(run("inspect", path, "--residency", "--json")[1])["residency"]
    n_pages = -(-path.stat().st_size // PAGE)
    assert facts["files"] == [{"pages": n_pages, "resident": n_pages}]
    assert {tensor["pages"] - tensor["resident"] for tensor in facts["tensors"]} == {0}
    assert "     in memory  ######" in run("inspect", path, "--residency", "--layout")[1]


def test_who_may_not_ask(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    path = written(tmp_path / "m.gguf", llama())
    monkeypatch.setattr(residency.os, "geteuid", lambda: 12345)
    monkeypatch.setattr(residency.os, "access", lambda _, mode: mode != os.W_OK)
    refusal = "which of its pages are in memory is told only to its owner and to those who may write to it"
    assert run("inspect", path, "--residency") == (5, "", f"{path}: {refusal}. Ask as its owner\n")
    assert refusal in page(llamatools.inspect(path), [])
    monkeypatch.setattr(residency.sys, "platform", "plan9")
    _, _, err = run("inspect", path, "--residency")
    assert err == f"{path}: which pages are in memory cannot be asked for on plan9, only on Linux and macOS\n"


@pytest.mark.parametrize("context", [128, 40])
def test_what_running_takes(context: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_weights(TINY), TINY)
    model, layout = load(path)
    file, cache, working, llamacpp = memory.needs(layout, context)
    assert file.nbytes == path.stat().st_size
    made = Cache.of(model.hparams, context)
    assert cache.nbytes == made.stored.nbytes
    assert llamacpp.nbytes == (made.keys.nbytes + made.values.nbytes) * -(-context // 256) * 256 // context
    ids = np.zeros(context, np.int64)
    generation.read_prompt(model, ids, Cache.of(model.hparams, context), lambda: False)  # compiles kernels, once
    tracemalloc.start()
    generation.read_prompt(model, ids, made, lambda: False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.5 * (working.nbytes - memory.SCRATCH) < peak < working.nbytes
    assert (memory.BATCH, memory.SCRATCH) == (generation.BATCH, weights.SCRATCH)


def test_memory_on_the_command_line(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = written(tmp_path / "m.gguf", llama())
    _, out, _ = run("inspect", path, "--memory", "--context", 10)
    assert max(map(len, out.splitlines())) <= 80
    assert "    of 10 tokens in float16: private, grows with the text\n" in out
    facts = json.loads(run("inspect", path, "--memory", "--json")[1])["memory"]
    assert [need["nbytes"] for need in facts[:2]] == [path.stat().st_size, 2 * 1 * 2 * 16 * 64 * 2]
    for arguments, message in (
        (["--memory", "--context", 65], "--context: 65 tokens are more than the 64 of the model's context\n"),
        (["--context", 9], "--context: only --memory makes use of it\n"),
        ([path, "--html", tmp_path / "p.html"], "--html: a page shows one model, and 2 are named\n"),
    ):
        assert run("inspect", path, *arguments) == (2, "", message)
    other = written(tmp_path / "o.gguf", build([key("general.architecture", scalar(STRING, "gpt2"))], [Tensor("a")]))
    message = f"{other}: what running takes is known for GGUF files of LLaMAs only\n"
    assert run("inspect", other, "--memory") == (5, "", message)


# ---- the page ----


class Page(HTMLParser):
    """The elements of a page, and the text of its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][1].get("id") == "data":
            self.data = self.data or data


def test_the_page_says_what_gguf_py_reads(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = write_gguf(tmp_path / "m.gguf", random_weights(TINY), TINY, matrices=gguf.GGMLQuantizationType.Q8_0)
    assert run("inspect", path, "--html", tmp_path / "p.html") == (0, "", "")
    parsed = Page((tmp_path / "p.html").read_text())
    facts = json.loads(parsed.data)
    theirs = [
        [t.name, t.tensor_type.name, [int(n) for n in t.shape[::-1]], 0, int(t.data_offset), int(t.n_bytes)]
        for t in gguf.GGUFReader(path).tensors
    ]
    assert [tensor[:6] for tensor in facts["tensors"]] == theirs
    assert facts["verdict"] == "sound"
    assert not [a for _, attributes in parsed.elements for a in attributes if a in ("src", "href", "onclick", "onload")]
    code, out, err = run("inspect", path, "--html", tmp_path / "p.html")
    assert (code, out) == (2, "")
    assert "exists already. Add --force" in err
    assert run("inspect", path, "--html", tmp_path / "p.html", "--force")[0] == 0


def test_names_are_data(tmp_path: Path) -> None:
    names = [
        "</script><script>alert(1)</script>",
        "<!--<script>",
        "<img src=x onerror=alert(1)>",
        "PAGE_DATA",
        "a\u2028b",
    ]
    path = written(
        tmp_path / "<b>m.gguf", build([key("general.architecture", scalar(STRING, "</dl>"))], [*map(Tensor, names)])
    )
    layout = llamatools.inspect(path)
    plain = Page(page(llamatools.inspect(written(tmp_path / "m.gguf", llama())), []))
    hostile = Page(page(layout, llamatools.findings(layout)))
    assert hostile.elements == plain.elements
    assert [tensor[0] for tensor in json.loads(hostile.data)["tensors"]] == [*names[:4], r"a\u2028b"]


def test_a_page_of_a_large_model_is_small(tmp_path: Path) -> None:
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_norm", "ffn_gate", "ffn_up", "ffn_down", "ffn_norm")
    names = [f"blk.{n}.{matrix}.weight" for n in range(80) for matrix in matrices]
    names += ["token_embd.weight", "output_norm.weight", "output.weight"]
    tensors = [Tensor(name, 1, (8192, 5978)) for name in names]
    header = build([key("general.architecture", scalar(STRING, "llama"))], tensors, data=False)
    path = written(tmp_path / "m.gguf", header)
    os.truncate(path, len(header) + len(names) * 8192 * 5978 * 2)
    text = page(llamatools.inspect(path), [])
    assert len(json.loads(Page(text).data)["tensors"]) == 723
    assert len(text) < 200_000
