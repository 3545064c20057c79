"""What a path holds is told by its content, whatever its name; and what holds no model is refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from ggml_files import build as build_ggml
from ggml_files import llama
from gguf_files import Tensor, build
from safetensors.numpy import save_file

import llamatools
from llamatools.check import SEVERITIES, findings
from llamatools.errors import FormatError, LlamatoolsError, UnsupportedError

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"


def write_safetensors(path: Path) -> None:
    save_file({"a": np.zeros(4, np.float32)}, path)


def write_big_endian(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


# What writes a file, and how its format is called.
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "GGUF v2": (lambda path: path.write_bytes(build(tensors=[Tensor("a")], version=2)), "GGUF v2"),
    "GGUF v3": (lambda path: path.write_bytes(build(tensors=[Tensor("a")])), "GGUF v3"),
    "safetensors": (write_safetensors, "safetensors"),
    "torch": (lambda path: path.write_bytes((TINY / "consolidated.00.pth").read_bytes()), "torch zip"),
    "ggml": (lambda path: path.write_bytes(build_ggml("ggml", llama()).data), "ggml"),
    "ggmf": (lambda path: path.write_bytes(build_ggml("ggmf v1", llama()).data), "ggmf v1"),
    "ggjt": (lambda path: path.write_bytes(build_ggml("ggjt v3", llama()).data), "ggjt v3"),
}


@pytest.mark.parametrize("name", ["model", "model.gguf", "model.txt"])
@pytest.mark.parametrize("kind", FILES)
def test_by_content_and_not_by_name(kind: str, name: str, tmp_path: Path) -> None:
    write, format = FILES[kind]
    path = tmp_path / name
    write(path)
    layout = llamatools.inspect(path)
    assert (layout.format, layout.problems) == (format, ())
    assert layout.tensors
    assert llamatools.open(path).tensors.keys() == {tensor.name for tensor in layout.tensors}


def test_a_meta_folder() -> None:
    assert llamatools.inspect(TINY).format == "Meta checkpoint"


# What is put at the path, the error, what is said.
REFUSED: dict[str, tuple[Callable[[Path], object], type[LlamatoolsError], str]] = {
    "nothing": (lambda path: None, FormatError, "no such file or directory"),
    "empty folder": (Path.mkdir, FormatError, "not a model's folder: none of params.json, consolidated.00.pth, config"),
    "pipe": (os.mkfifo, FormatError, "neither a file nor a folder"),
    "text": (
        lambda path: path.write_text("Dear reader,"),
        FormatError,
        "no model file: it begins with b'Dear rea'. GGUF, safetensors, .pth, ggml, ggmf and ggjt files are read",
    ),
    "GGUF v1": (
        lambda path: path.write_bytes(build(version=1)),
        UnsupportedError,
        "GGUF version 1. Versions 2 and 3 are read, little-endian",
    ),
    "GGUF of the other byte order": (write_big_endian, UnsupportedError, "a big-endian GGUF file of version 3"),
    "other JSON": (lambda path: path.write_text('{"dim": 64}'), FormatError, "no weight_map in it"),
    "old torch": (
        lambda path: path.write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."),
        UnsupportedError,
        "a file of torch.save before version 1.6",
    ),
    "tar": (lambda path: path.write_bytes(bytes(257) + b"ustar" + bytes(250)), UnsupportedError, "a tar archive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    make, kind, said = REFUSED[case]
    path = tmp_path / "any"
    make(path)
    with pytest.raises(kind, match=said) as error:
        llamatools.open(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_device() -> None:
    with pytest.raises(FormatError, match="/dev/null: neither a file nor a folder"):
        llamatools.inspect("/dev/null")


def test_what_readers_tell_of_a_set_are_findings(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(build_ggml("ggmf v1", llama(), dim=512).data)
    found = findings(llamatools.inspect(path))
    assert (found[0].code, found[0].severity) == ("shard-missing", "error")
    assert {"shard-missing", "shard-name", "shard-alien"} <= SEVERITIES.keys()


@pytest.mark.parametrize("kind", ["safetensors", "ggjt"])
def test_on_the_command_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    FILES[kind][0](path)
    shown = subprocess.run(
        [sys.executable, "-m", "llamatools", "inspect", str(path)], capture_output=True, text=True, check=False
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"\nformat      {FILES[kind][1]}, " in shown.stdout
    assert "\nverdict     sound\n" in shown.stdout
