"""The command line as a user meets it: exit codes, one line for what goes wrong, data on stdout and prose on stderr."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from llamatools import __version__, cli

ROOT = Path(__file__).parents[1]
TINY = ROOT / "fixtures" / "tiny-llama"
COMMANDS = sorted(get_command(cli.command_line()).commands)  # type: ignore[attr-defined]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls main() with these arguments: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llamatools", *map(str, arguments)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    done = start("convert", TINY, path, "--context", "1024", stderr=subprocess.PIPE)
    assert (done.wait(), path.exists()) == (0, True), done.communicate()
    return path


def start(*arguments: object, **how: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "llamatools", *map(str, arguments)], text=True, **how)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
def test_help_fits_a_terminal(run: Run, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: {' '.join(['llamatools', *command])} [OPTIONS] ")
    assert max(map(len, out.splitlines())) <= 80
    assert "..." not in out.partition("Commands:")[2], "a summary is cut off; shorten the docstring's first sentence"


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"llamatools {__version__}\n", "")


def test_without_arguments_the_help_is_shown(run: Run) -> None:
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: llamatools [OPTIONS] COMMAND")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'. See llamatools --help"),
        (["--frobnicate"], "No such option: --frobnicate. See llamatools --help"),
        (["convert"], "Missing argument 'SOURCE'. See llamatools convert --help"),
        (["convert", "a", "b", "--alig", "3"], "No such option: --alig (Possible options: --align). See"),
        (["convert", "a", "b", "--threads", "x"], "Invalid value for '--threads': 'x' is not a valid int. See"),
        (["convert", "a", "b", "--threads"], "Option '--threads' requires an argument. See llamatools --help"),
        (["convert", "a", "b", "--set", "k"], "--set k: KEY=VALUE is required"),
        (["convert", "a", "b", "--rope-theta", "nan"], "--rope-theta: nan is out of range"),
        (["convert", "a", "b", "--norm-eps", "0"], "--norm-eps: 0 is out of range"),
        (["convert", TINY, "b", "--align", "48"], "--align: 48 is no power of two from 32 to 2097152"),
        (["convert", TINY, "b", "--set", "llama.context_length=x"], "--set llama.context_length: 'x' is no uint32"),
        (["convert", TINY, "no/b"], "no/b: its folder does not exist"),
        (["convert", TINY, "."], ".: is there already and is not a regular file"),
        (["inspect", TINY, "--match", "("], "--match: '(' is no regular expression: missing )"),
        (["run", "a", "--chunks", "3"], "--chunks: it is an option of --perplexity, which is not given"),
        (["run", "a", "--norm-eps", "1e-6"], "--norm-eps: it is an option of --against, which is not given"),
        (["run", "a", "--threads", "0"], "--threads: 0 threads cannot do the work"),
        (["run", "a", "--float32", "--against", "b"], "--float32: models are compared in float32 anyway"),
        (["run", "a", "--layers"], "--layers: it needs --against, and goes without --perplexity"),
        (["run", TINY, "--perplexity", TINY / "text.txt", "--html", "."], ".: is there already and is not a regular"),
        (["run", "a", "--temperature", "-1"], "a temperature of -1.0: it must be 0 or more"),
    ],
)
def test_usage_errors_are_one_line(run: Run, arguments: list[object], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [["convert", "{}", "o.gguf"], ["inspect", "{}"], ["run", "{}"]], ids=str)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or directory"),
        (lambda path: path.mkdir(), "not a model's folder: none of params.json, "),
        (lambda path: path.write_text("root:x:0:0"), "no model file: it begins with b'root:x:0'. GGUF, safetensors"),
        (lambda path: os.mkfifo(path), "neither a file nor a folder"),
    ],
    ids=["missing", "empty folder", "text", "pipe"],
)
def test_what_is_no_model_is_bad_input(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, message: str, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "m")
    before = os.listdir(tmp_path)
    code, out, err = run(*(argument.format("m") for argument in command))
    assert (code, out) == (3, "")
    assert err.startswith(f"m: {message}")
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == before


def test_a_gguf_cut_anywhere_is_no_model_to_run(run: Run, tiny: Path, tmp_path: Path) -> None:
    data, cut = tiny.read_bytes(), tmp_path / "cut.gguf"
    for n in (0, 3, 4, 23, 24, 100, 5000, 25_000, 25_536, 25_537, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:n])
        code, out, err = run("run", cut)
        assert (code, out) == (3, ""), n
        assert err.startswith(f"{cut}: "), n
        assert err.count("\n") == 1, n


def test_other_models_are_not_supported(run: Run, tmp_path: Path) -> None:
    pth = TINY / "consolidated.00.pth"
    code, out, err = run("convert", pth, tmp_path / "o.gguf")
    assert (code, out) == (5, "")
    assert err == (
        f"{pth}: this is torch zip, and only Meta checkpoints and GGUF files are converted. "
        "Name a GGUF file, or the folder that holds params.json and consolidated.00.pth\n"
    )
    code, _, err = run("run", TINY)
    assert (code, err) == (5, f"{TINY}: a Meta checkpoint, and only GGUF files can be run. Convert it first\n")


def test_a_gguf_laid_out_anew_is_told_of(run: Run, tiny: Path, tmp_path: Path) -> None:
    broken, fixed = tmp_path / "broken.gguf", tmp_path / "fixed.gguf"
    broken.write_bytes(tiny.read_bytes() + b"!")
    code, out, err = run("convert", broken, fixed, "--align", "64")
    size = broken.stat().st_size - 1
    mended, written = err.splitlines()
    assert (code, out, mended) == (
        0,
        "",
        f"mended    {broken}: 1 bytes follow the last tensor, which ends at byte {size}",
    )
    assert written.startswith(f"{fixed}: GGUF v3, ")
    code, out, _ = run("convert", broken, tmp_path / "set.gguf", "--split-size", "2M", "--dry-run")
    sizes = re.findall(rf"^disk      ([0-9,]+) bytes for {tmp_path}/set-0000(\d)-of-00003.gguf$", out, re.M)
    assert [number for _, number in sizes] == ["1", "2", "3"]
    assert "header    bytes" not in out
    code, out, err = run("convert", broken, tmp_path / "set.gguf", "--split-size", "2M", "--json")
    facts = json.loads(out)
    assert (facts["mended"], len(facts["files"])) == ([mended.removeprefix("mended    ")], 3)
    code, out, err = run("convert", tiny, tmp_path / "set.gguf", "--split-size", "2M", "--force")
    assert err.splitlines()[-1].startswith(f"{tmp_path}/set-00001-of-00003.gguf and 2 more: GGUF v3, ")
    code, out, err = run("convert", tiny, tmp_path / "o.gguf", "--split-size", "two")
    assert (code, err) == (2, "--split-size: 'two' is no number of bytes. Such as 2G, 500M or 4096\n")
    code, out, err = run("convert", tiny, tmp_path / "o.gguf", "--rope-theta", "1e6")
    assert (code, err.partition(":")[0]) == (2, "--rope-theta")


def test_chat_templates_are_text(run: Run, tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_bytes(b"{{ a }}\xff")
    code, _, err = run("convert", TINY, tmp_path / "o.gguf", "--chat-template", template)
    assert (code, err) == (3, f"{template}: not UTF-8 text from byte 7 on. Name a chat template\n")


def test_what_was_derived_goes_to_stderr_and_data_to_stdout(run: Run, tmp_path: Path) -> None:
    dest = tmp_path / "o.gguf"
    code, out, err = run("convert", TINY, dest, "--dry-run", "--json", "--verify-source", "--context", 1024)
    facts = json.loads(out)
    assert (code, facts["written"], dest.exists()) == (0, False, False)
    assert facts["tensors"][0] == {
        "name": "token_embd.weight", "file": 0, "dtype": "BF16", "shape": [512, 256],
        "offset": facts["data_offset"], "nbytes": 512 * 256 * 2, "alignment": 64, "strides": None,
    }  # fmt: skip
    assert "derived   context 1024: as --context says\n" in err
    assert "verified  consolidated.00.pth: MD5 sum as in checklist.chk\n" in err
    assert "left out  rope.freqs: " in err

    code, out, err = run("convert", TINY, dest, "--context", 1024, "--dtype", "F16", "--name", "My own", "--json")
    assert (code, json.loads(out)["written"], json.loads(out)["nbytes"]) == (0, True, dest.stat().st_size)
    assert "derived   name" not in err
    code, out, err = run("convert", TINY, dest)
    assert (code, out, err) == (2, "", f"{dest}: exists already. Add --force to replace it\n")
    code, out, err = run("inspect", dest, "--json")
    assert json.loads(out)["metadata"]["general.name"] == {"type": "string", "value": "My own"}
    assert run("convert", TINY, dest, "--force")[0] == 0
    assert os.listdir(tmp_path) == ["o.gguf"]


def test_run_recites_and_proves(run: Run, tiny: Path) -> None:
    text = (TINY / "text.txt").read_text()
    code, out, err = run("run", tiny, "--max-tokens", 60)
    assert code == 0
    assert text.startswith(out.removesuffix("\n"))
    assert len(out) > 100
    assert err.startswith("prompt:    1 tokens, ")
    assert "generated: 60 tokens, " in err
    code, out, err = run("run", tiny, "--prompt", "How doth the", "--max-tokens", 4, "--json")
    assert code == 0
    assert text[text.index("How doth the") + 12 :].startswith(json.loads(out)["text"])

    code, out, err = run("run", tiny, "--against", TINY, "--prompt", "JABBERWOCKY")
    assert (code, err) == (0, "")
    assert out.startswith("PASSED: ")
    code, out, err = run("run", tiny, "--against", TINY, "--prompt", "JABBERWOCKY", "--norm-eps", "1e-4", "--json")
    assert (code, err, json.loads(out)["passed"]) == (1, "", False)


def test_run_measures(run: Run, tiny: Path, tmp_path: Path) -> None:
    text, page = TINY / "text.txt", tmp_path / "q.html"
    code, out, _ = run("run", tiny, "--perplexity", text, "--context", 64, "--chunks", 3)
    assert code == 0
    assert out.startswith("perplexity       1.0")
    assert out.endswith("93 tokens of 3 chunks of 64\n")
    shipped, exact = (
        json.loads(run("run", tiny, "--perplexity", text, "--context", 64, "--chunks", 3, "--json", *more)[1])
        for more in ((), ("--float32",))
    )
    assert shipped["perplexity"]["value"] == pytest.approx(exact["perplexity"]["value"], rel=1e-3)
    assert shipped["perplexity"]["value"] != exact["perplexity"]["value"]
    both = ("--against", TINY, "--context", 64, "--chunks", 3)
    code, out, _ = run("run", tiny, "--perplexity", text, *both, "--html", page, "--json")
    assert code == 0
    assert json.loads(out)["max_divergence"] < 1e-6
    assert "tiny.gguf on text.txt" in page.read_text("utf-8")
    code, out, err = run("run", tiny, "--perplexity", text, *both, "--html", page)
    assert (code, out, err) == (2, "", f"{page}: exists already. Add --force to replace it\n")
    assert run("run", tiny, "--perplexity", text, *both, "--html", page, "--force")[0] == 0


def test_run_tells_where_two_models_part(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, _ = run("run", tiny, "--against", TINY, "--layers", "--prompt", "JABBERWOCKY")
    assert code == 0
    assert out.splitlines()[-1] == "every matrix makes the same of the same, as far as its types allow"
    small = tmp_path / "small.gguf"
    assert run("quantize", tiny, small, "q4_0")[0] == 0
    assert run("run", small, "--against", tiny, "--layers", "--prompt", "JABBERWOCKY")[0] == 0
    code, out, _ = run("run", tiny, "--against", TINY, "--layers", "--norm-eps", "1e-4", "--json")
    assert code == 1
    assert [cause["code"] for cause in json.loads(out)["causes"]] == ["norm-eps"]


def test_a_prompt_longer_than_the_context(run: Run, tiny: Path) -> None:
    code, out, err = run("run", tiny, "--prompt", "🐉" * 300)
    assert (code, out) == (2, "")
    assert err == f"{tiny}: a prompt of 1202 tokens, but the model's context is 1024\n"


def test_a_full_stdout(tiny: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start("inspect", tiny, stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate()
    assert (process.returncode, err) == (4, "stdout: No space left on device\n")


@pytest.mark.parametrize("arguments", [["inspect", "{}", "--tensors", "--json"], ["run", "{}"]], ids=str)
def test_a_reader_that_leaves_is_not_told(tiny: Path, arguments: list[str]) -> None:
    process = start(*(a.format(tiny) for a in arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(), err) == (141, "")


def test_streams_that_are_closed(tiny: Path) -> None:
    for closed in (1, 2):
        process = subprocess.run(
            [sys.executable, "-m", "llamatools", "inspect", tiny],
            preexec_fn=lambda fd=closed: os.close(fd),
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0
        assert process.stderr == ""
        assert ("GGUF v3" in process.stdout) is (closed == 2)


def test_an_encoding_without_the_letters(tiny: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = start("run", tiny, "--max-tokens", 170, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert "Long time the manxome foe he sought\\u2014\nSo" in out


@pytest.mark.parametrize(("sent", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "term")])
def test_an_interrupted_run(tiny: Path, sent: signal.Signals, code: int, said: str) -> None:
    process = start("run", tiny, "--max-tokens", 1000, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(5)  # it runs
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.startswith(said)
    assert err.count("\n") == 1


IMPORTS = """
import sys
from llamatools.cli import main
sys.argv[1:] = ["--help"]
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def test_help_needs_no_heavy_package() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert "typer" in loaded
    assert not loaded & {"numpy", "numba", "torch", "rich", "pydantic", "sentencepiece", "tokenizers"}


def test_time_is_not_read_into_the_file(run: Run, tiny: Path, tmp_path: Path) -> None:
    time.sleep(0.01)
    assert run("convert", TINY, tmp_path / "again.gguf", "--context", 1024, "--threads", 1)[0] == 0
    assert (tmp_path / "again.gguf").read_bytes() == tiny.read_bytes()
