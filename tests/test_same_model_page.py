"""docs/how-to/same-model.md: its commands are run as they stand there; and the command line around them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from meta_checkpoints import write_meta
from same_models import OPTIONS, Q, data_of, params, state_of, write_hf
from test_docs import examples

import llamatools
from llamatools import QuantizeOptions

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "same-model.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes) -> Path:
    folder = tmp_path_factory.mktemp("models")
    meta = write_meta(folder / "llama-2-7b", state_of(), params(), sentencepiece_model, n_shards=2)
    llamatools.convert(meta, folder / "model.gguf", options=OPTIONS)
    llamatools.quantize(folder / "model.gguf", folder / "small.gguf", "q8_0", options=QuantizeOptions())
    write_hf(folder / "hf-model", state_of())
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llamatools", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_pages_commands(folder: Path) -> None:
    done = [run(folder, *arguments) for arguments in examples(PAGE)]
    assert [(each.returncode, each.stderr) for each in done] == [(0, ""), (1, ""), (0, ""), (0, ""), (0, ""), (0, "")]
    last = [each.stdout.splitlines()[-1] for each in done]
    assert (last[0], last[1]) == ("the same model", "not the same")
    assert last[2] == "30 of 30 tensors have the digest that is stored in the file"
    assert last[3] in done[2].stdout.splitlines()
    assert last[4:] == ["proven: every weight of the source, and nothing else"] * 2


def test_json_and_exit_codes(folder: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copy(folder / "model.gguf", tmp_path / "bad.gguf"))
    data_of(bad)[Q][0, 0] ^= 1
    for option, schema in (("--hash", "hash"), ("--diff", "diff"), ("--against", "against")):
        value = [] if option == "--hash" else ["model.gguf"]
        done = run(folder, "inspect", str(bad), option, *value, "--json")
        facts = json.loads(done.stdout)
        assert (done.returncode, facts["schema"]) == (1, f"llamatools.{schema}/1")
        if option == "--diff":
            assert [t["name"] for t in facts["tensors"] if t["verdict"] == "different"] == [Q]
        else:
            assert [finding["where"] for finding in facts["findings"]] == [f"tensor {Q!r}"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--hash", "--diff", "small.gguf"], "--hash, --diff, --against: one at a time\n"),
        (["--imatrix", "i.dat"], "--imatrix: only --against makes use of it\n"),
        (["--full", "--tensors"], "--full: only --metadata and --json make use of it\n"),
        (["--force"], "--force: only --html makes use of it\n"),
        *(
            (["--hash", *option], f"{option[0]}: --hash makes no use of it. Ask for one at a time\n")
            for option in (
                *(["--tensors"], ["--metadata"], ["--layout"], ["--residency"], ["--memory"], ["--scan"]),
                *(["--html", "page.html"], ["--align", "32"]),
            )
        ),
        (["--diff", "small.gguf", "--scan"], "--scan: --diff makes no use of it. Ask for one at a time\n"),
        (["--against", "small.gguf", "--layout"], "--layout: --against makes no use of it. Ask for one at a time\n"),
        (["small.gguf", "--diff", "model.gguf"], "--diff: takes one PATH, not 2\n"),
        (["small.gguf", "--against", "model.gguf"], "--against: takes one PATH, not 2\n"),
    ],
)
def test_requests_that_cannot_be_met(folder: Path, arguments: list[str], line: str) -> None:
    done = run(folder, "inspect", "model.gguf", *arguments)
    assert (done.returncode, done.stderr) == (2, line)


@pytest.mark.parametrize("kept", [100, 3000, -40])
def test_what_cannot_be_hashed_whole_is_explained(kept: int, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes((folder / "model.gguf").read_bytes()[:kept])
    done = run(tmp_path, "inspect", "--hash", "cut.gguf")
    shown, why = done.stdout.splitlines()[:2]
    assert (done.returncode, done.stderr) == (1, "")
    assert shown == "cut.gguf: not hashed, since it is not whole"
    assert why.startswith("error: truncated: ") or why.startswith("error: damaged: ")
    facts = json.loads(run(tmp_path, "inspect", "--hash", "cut.gguf", "--json").stdout)
    assert facts["weights"] is None
    assert why == f"error: {facts['findings'][0]['code']}: {facts['findings'][0]['where']}: " + (
        f"{facts['findings'][0]['what']}. {facts['findings'][0]['remedy']}"
    )
