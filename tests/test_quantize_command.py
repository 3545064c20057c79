"""`llamatools quantize` as a process: what it prints, refuses and leaves behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quantizing import TINY_LLAMA, damaged, digest, run

import llamatools


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["q4_q_m"], 2, "'q4_q_m' is neither a named recipe nor a file. Did you mean q4_k_m"),
        (["q4_0", "--tensor-type", "ffn=q4_9"], 2, "--tensor-type ffn=q4_9: unknown dtype 'q4_9'. Did you mean"),
        (
            ["q4_0", "--tensor-type", "ffn=iq2_xs"],
            5,
            "ffn=iq2_xs: llamatools cannot write IQ2_XS weights",
        ),
        (["q4_0", "--tensor-type", "nowhere=q8_0"], 2, "no tensor's name matches it"),
        (["q4_0", "--output-type", "q9"], 2, "--output-type: unknown dtype 'q9'"),
        (["q4_0", "--align", "48"], 2, "48 is no power of two from 32 to 2097152"),
        (["q4_0", "--align", "0"], 2, "0 is no power of two from 32 to 2097152"),
        (["q4_0", "--report", "/nowhere/report.json"], 2, "/nowhere/report.json: its folder does not exist"),
    ],
)
def test_requests_that_cannot_be_met(
    wide_gguf: Path, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    before = wide_gguf.read_bytes()
    done = run("quantize", wide_gguf, tmp_path / "q.gguf", *arguments)
    assert done.returncode == code
    assert said in done.stderr.splitlines()[-1]
    assert len([line for line in done.stderr.splitlines() if "compiling" not in line]) == 1
    assert os.listdir(tmp_path) == []
    assert wide_gguf.read_bytes() == before


def test_command_line(wide_gguf: Path, tmp_path: Path) -> None:
    printed = run("quantize", wide_gguf, tmp_path / "q.gguf", "q4_k_s", "--print-recipe")
    assert not (tmp_path / "q.gguf").exists()
    (tmp_path / "recipe").write_text(printed.stdout)
    done = run(
        "quantize", wide_gguf, tmp_path / "q.gguf", tmp_path / "recipe", "--report", tmp_path / "report.json", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(done.stdout)["quantized"] == report
    llamatools.quantize(wide_gguf, tmp_path / "named.gguf", "q4_k_s")
    assert digest(tmp_path / "named.gguf") == digest(tmp_path / "q.gguf")
    shown = run("quantize", wide_gguf, tmp_path / "r.gguf", "q4_k_s", "--threads", "1")
    assert shown.stdout.splitlines()[0].split() == ["tensors", "dtype", "size", "error", "worst", "block"]
    assert (tmp_path / "r.gguf").read_bytes() == (tmp_path / "named.gguf").read_bytes()


def test_the_recipe_of_one_pass_is_printed(tiny_gguf: Path, tmp_path: Path) -> None:
    asked = ("--tensor-type", "ffn_up=q8_0", "--pure")
    printed = run(
        "convert", TINY_LLAMA, tmp_path / "q.gguf", "--dtype", "Q4_0", *asked, "--context", 64, "--print-recipe"
    )
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == run("quantize", tiny_gguf, "x", "Q4_0", *asked, "--print-recipe").stdout
    assert os.listdir(tmp_path) == []
    (tmp_path / "recipe").write_text(printed.stdout)
    named, file = tmp_path / "named.gguf", tmp_path / "file.gguf"
    for path, recipe, how in ((named, "Q4_0", asked), (file, tmp_path / "recipe", ["--strict"])):
        done = run("convert", TINY_LLAMA, path, "--dtype", recipe, *how, "--context", 64)
        assert done.returncode == 0, done.stderr
    assert digest(named) == digest(file)


@pytest.mark.parametrize("option", [["--report", "r.json"], ["--print-recipe"]])
@pytest.mark.parametrize("dtype", ["auto", "F16"])
def test_without_a_recipe_there_is_nothing_to_report(tmp_path: Path, dtype: str, option: list[str]) -> None:
    done = run("convert", TINY_LLAMA, "q.gguf", "--dtype", dtype, "--context", 64, *option, cwd=tmp_path)
    assert done.returncode == 2
    said = f"{option[0]}: {dtype.lower()} is no recipe, which it needs. Name one with --dtype\n"
    assert done.stderr == said
    assert os.listdir(tmp_path) == []


def test_a_report_never_replaces_a_model(wide_gguf: Path, tmp_path: Path) -> None:
    before = wide_gguf.read_bytes()
    for report, said in (
        (wide_gguf, "is there already and is no report"),
        (tmp_path / "q.gguf", "is both the model and"),
    ):
        done = run("quantize", wide_gguf, tmp_path / "q.gguf", "q4_0", "--report", report, "--force")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert said in done.stderr
    assert os.listdir(tmp_path) == []
    assert wide_gguf.read_bytes() == before


def test_a_damaged_source_is_refused_when_asked(wide_gguf: Path, tmp_path: Path) -> None:
    llamatools.convert(wide_gguf, tmp_path / "whole.gguf")
    sound = run("quantize", tmp_path / "whole.gguf", tmp_path / "q.gguf", "q8_0", "--verify-source")
    assert sound.returncode == 0
    assert "verified  21 of 21 tensors: SHA-256 as stored" in sound.stderr.splitlines()
    path = damaged(tmp_path / "whole.gguf", tmp_path / "damaged.gguf", "blk.0.attn_q.weight")
    done = run("quantize", path, tmp_path / "no.gguf", "q8_0", "--verify-source")
    assert done.returncode == 3
    assert "damaged.gguf: tensor 'blk.0.attn_q.weight': its bytes have the SHA-256" in done.stderr
    assert not (tmp_path / "no.gguf").exists()


def test_a_full_disk_leaves_nothing(wide_gguf: Path, tmp_path: Path) -> None:
    done = run(
        "quantize", wide_gguf, tmp_path / "q.gguf", "q4_0",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )  # fmt: skip
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1] == f"{tmp_path / 'q.gguf'}: file too large"
    assert os.listdir(tmp_path) == []


SLOW = """
import time
from llamatools import tensors
read = tensors.FileTensor.read
def slow(*args):
    time.sleep(0.2)
    return read(*args)
tensors.FileTensor.read = slow
from llamatools.cli import main
main()
"""


def test_an_interruption_leaves_nothing(wide_gguf: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "quantize", str(wide_gguf), str(tmp_path / "q.gguf"), "q4_0", "--threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not os.listdir(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; nothing was left behind"
    assert os.listdir(tmp_path) == []
