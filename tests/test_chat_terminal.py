"""`llamatools run --chat` as a user meets it: in a pipe, and in a terminal with its keys; and --prompt-file."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamatools import MetaOptions, Overrides, convert
from llamatools.cli.printing import _harmless

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
CHAT = ("--chat", "--chat-format", "llama-2")
SECONDS = 60  # that anything may take


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("terminal") / "tiny.gguf"
    convert(TINY, path, options=MetaOptions(overrides=Overrides(context=1024)))
    return path


def piped(said: bytes, *arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "llamatools", "run", *map(str, arguments)]
    done = subprocess.run(command, input=said, capture_output=True, check=False, timeout=SECONDS)
    said_once = "compiling kernels for this processor, once ...\n"
    return done.returncode, done.stdout.decode(), done.stderr.decode().replace(said_once, "")


def test_a_conversation_in_a_pipe(tiny: Path) -> None:
    options = (tiny, *CHAT, "--max-tokens", 8)
    code, first, _ = piped(b"", *options, "--prompt", "How doth")
    assert (code, first[0].isspace(), len(first) > 9) == (0, False, True)
    code, out, err = piped(b"How doth\n\n/new\nHow doth\n\xff\n", *options, "--context", 90)
    assert (code, err) == (0, "format:    llama-2, by --chat-format\ncontext:   90 tokens\n" + 3 * "(token limit)\n")
    assert out.startswith(2 * first)
    assert not out.startswith(3 * first)


def test_a_full_context_in_a_pipe(tiny: Path) -> None:
    options = (tiny, *CHAT, "--context", 40)
    code, out, err = piped(b"How doth\nthe little\n", *options)
    assert code == 2
    assert out
    full, refused = err.splitlines()[2:]
    assert full == "(context full: 40 tokens. /new begins a new conversation)"
    assert refused.startswith("the context is full: it holds 40 tokens, ")


def test_a_format_that_cannot_be_told(tiny: Path) -> None:
    code, out, err = piped(b"", tiny, "--chat")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"{tiny}: which format its conversations have cannot be told from its chat template, tokens")


def test_a_prompt_from_a_file(tiny: Path, tmp_path: Path) -> None:
    expected = piped(b"", tiny, "--prompt", "How doth\n the", "--max-tokens", 4)
    (tmp_path / "prompt").write_text("How doth\n the\n")
    for said, name in ((b"", tmp_path / "prompt"), (b"How doth\n the\n", "-")):
        assert piped(said, tiny, "--prompt-file", name, "--max-tokens", 4)[:2] == expected[:2]
    (tmp_path / "prompt").write_bytes(b"How \xff")
    refused = "not UTF-8 text from byte 4 on. Name a text as the prompt\n"
    assert piped(b"", tiny, "--prompt-file", tmp_path / "prompt") == (3, "", f"{tmp_path / 'prompt'}: {refused}")
    assert piped(b"How \xff", tiny, "--prompt-file", "-") == (3, "", f"stdin: {refused}")
    code, _, err = piped(b"", tiny, "--prompt-file", tmp_path / "none")
    assert (code, err) == (3, f"{tmp_path / 'none'}: no such file or directory\n")


class Terminal:
    """A conversation in a terminal."""

    def __init__(self, model: Path, *arguments: str) -> None:
        self._keys, inner = pty.openpty()
        command = [sys.executable, "-m", "llamatools", "run", str(model), *CHAT]
        environment = {**os.environ, "TERM": "xterm", "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(
            [*command, *arguments], stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(inner)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self._keys, keys.encode())

    def wait_for(self, text: str) -> str:
        """What was shown up to `text`, which ends there."""
        end = time.monotonic() + SECONDS
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self._keys], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._keys, 4096).decode("utf-8", "replace").replace("\r\n", "\n")
                except OSError:  # how Linux says that the other side is closed
                    raise AssertionError(self.seen) from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def end(self) -> int:
        return self.process.wait(SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keys)


@pytest.fixture
def terminal(tiny: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    terminal = Terminal(tiny, *getattr(request, "param", ()))
    terminal.wait_for("> ")
    yield terminal
    terminal.close()


@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_a_key_at_an_empty_line_ends(terminal: Terminal, key: str) -> None:
    terminal.type(key)
    assert terminal.end() == 0


def test_ctrl_c_drops_a_line_that_was_begun(terminal: Terminal) -> None:
    terminal.type("How do")
    terminal.wait_for("How do")
    terminal.type("\x03")
    terminal.wait_for("> ")
    terminal.type("\x03")
    assert terminal.end() == 0


def test_ctrl_c_stops_a_reply_and_not_the_program(terminal: Terminal, tiny: Path) -> None:
    begins = piped(b"How doth", tiny, *CHAT, "--max-tokens", 4)[1].split()[0]
    terminal.type("How doth\r")
    terminal.wait_for("How doth")
    terminal.wait_for(begins)
    terminal.type("\x03")
    terminal.wait_for("(interrupted)")
    terminal.wait_for("> ")
    terminal.type("/new\r")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.parametrize("terminal", [("--max-tokens", "3", "--context", "80")], indirect=True)
def test_lines_that_are_pasted_are_one_message(terminal: Terminal) -> None:
    terminal.type("\x1b[200~How doth\nthe little\x1b[201~\r")
    terminal.wait_for("(token limit)")
    terminal.wait_for("> ")
    terminal.type("How doth\nthe little\n")  # by a terminal that does not mark what is pasted
    terminal.wait_for("(token limit)")
    terminal.wait_for("> ")
    terminal.type("How doth " * 50 + "\r")
    refused = terminal.wait_for("Say less, or /new to begin a new conversation")
    assert refused.count("token limit") == 0
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_control_characters_do_nothing_on_a_terminal() -> None:
    assert _harmless("a\x1b[2J\r\x07\x9b\u202eb\u2028\x00") == "a\\x1b[2J\\r\\x07\\x9b\\u202eb\\u2028\\x00"
    kept = "naïve\n\t東京\u3000👨\u200d👩\ufe0f é\u0301 \xa0"
    assert _harmless(kept) == kept
