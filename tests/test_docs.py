"""The documentation is of this code: the command line's page is generated, links lead somewhere, examples parse."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from llamatools_runtime.tolerance import ROUNDED
from typer.main import get_command
from typer.testing import CliRunner

from llamatools import MetaOptions, Overrides, cli, convert, errors

ROOT = Path(__file__).parents[1]
TINY_LLAMA = ROOT / "fixtures" / "tiny-llama"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "fixtures").glob("*.md")])
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "command_line.py"))
    assert generator["PATH"].read_text() == generator["text"](), "run `make docs`"


@pages
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not re.match(r"https?:", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def examples(page: Path) -> Iterator[list[str]]:
    """The arguments of each `llamatools ...` in a block of code."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("llamatools "):
                yield shlex.split(line.partition("|")[0], comments=True)[1:]


@pages
def test_examples_use_commands_and_options_that_exist(page: Path) -> None:
    commands = get_command(cli.command_line()).commands  # type: ignore[attr-defined]
    for name, *arguments in examples(page):
        options = {option for parameter in commands[name].params for option in parameter.opts}
        used = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        assert used <= options, f"llamatools {name}: {used - options}"


def test_there_are_examples_to_check() -> None:
    assert len(list(examples(ROOT / "README.md"))) >= 4


def test_exit_codes_are_all_documented() -> None:
    table = (ROOT / "docs" / "reference" / "exit-codes.md").read_text()
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)}
    assert documented == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def test_the_bounds_of_the_proof_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "explanation" / "proof.md").read_text()
    found = re.findall(r"^\| ([A-Z0-9_]+) \| ([\d.e-]+) \| ([\d.e-]+) \|$", page, re.M)
    assert {name: (float(weights), float(divergence)) for name, weights, divergence in found} == ROUNDED


@pytest.mark.parametrize("name", ["alignment", "memory"])
def test_examples_of_a_how_to_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(TINY_LLAMA, tmp_path / "model.gguf", options=MetaOptions(overrides=Overrides(context=1024)))
    (tmp_path / "fixtures").symlink_to(TINY_LLAMA.parent)
    monkeypatch.chdir(tmp_path)
    commands = list(examples(ROOT / "docs" / "how-to" / f"{name}.md"))
    assert len(commands) >= 5
    for command in commands:
        assert CliRunner().invoke(cli.command_line(), command).exit_code == 0, command
