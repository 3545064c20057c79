"""The default view of `inspect`, its options, and what several files do to its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_files import F32, STRING, U8, array, key, scalar
from llama_files import data_start, llama, written
from test_cli import Run, run  # noqa: F401 (a fixture)
from test_impostors import POINTER

from llamatools.check import Finding
from llamatools.dtypes import BF16, F16
from llamatools.layout import File, Layout, PlacedTensor
from llamatools.overview import facts, finding_lines, human_count, verdict

START = data_start()
END = START + 42_368


def test_a_sound_file(run: Run, tmp_path: Path) -> None:  # noqa: F811
    code, out, err = run("inspect", written(tmp_path / "m.gguf", llama()))
    assert (code, err) == (0, "")
    assert out == (
        "file        m.gguf\n"
        f"format      GGUF v3, {END:,} bytes\n"
        "model       llama\n"
        "parameters  10,592 in 11 tensors, 32.00 bits per weight\n"
        "dtypes      F32 42,368 bytes (100%)\n"
        "shape       1 layer, dim 32, hidden 64, norm_eps 1e-05\n"
        "heads       4 of width 8, 2 for keys and values\n"
        "context     64 tokens, rope_theta 10000\n"
        "tokenizer   llama (default), 40 tokens, bos 1, eos 2, unknown 0\n"
        f"alignment   {(START | 128) & -(START | 128)} holds for every tensor; "
        "the file promises 32, its dtypes need 4\n"
        "mapping     in place, without a copy; tensors share pages of 4096 bytes\n"
        "verdict     sound\n"
    )


def test_names_and_small_parts(run: Run, tmp_path: Path) -> None:  # noqa: F811
    named = [key("general.name", scalar(STRING, "Some Llama 7M")), key("general.size_label", scalar(STRING, "7M"))]
    _, out, _ = run("inspect", written(tmp_path / "m.gguf", llama(more_keys=named)))
    assert "model       Some Llama 7M, llama\n" in out  # the size stands in the next line
    placed = (PlacedTensor("a", F16, (10, 100), 0, 2000), PlacedTensor("b", BF16, (1, 1), 2000, 2))
    layout = Layout("safetensors", (File(tmp_path / "m", 2002),), placed)
    assert ("dtypes", "F16 2,000 bytes (100%), BF16 2 bytes (<1%)") in list(facts(layout))


def test_a_damaged_file(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = written(tmp_path / "m.gguf", llama(more_keys=[key("a\nb", scalar(U8, 1))], cut=1))
    code, out, _ = run("inspect", path)
    assert code == 1
    start = data_start({"more_keys": [key("a\nb", scalar(U8, 1))]})
    assert max(map(len, out.splitlines())) <= 80
    assert " ".join(out.partition("verdict")[2].split()) == (
        f"1 error, 1 warning error truncated: tensor 'output_norm.weight': its data is bytes {start + 42_240} to "
        f"{start + 42_368}, but the file ends at {start + 42_367}: 1 bytes of 1 tensor are missing. The file is "
        r"probably truncated warning hostile-name: key 'a\nb': its name has characters that steer a terminal, cannot "
        "be seen, or are no UTF-8"
    )


def test_a_header_that_ends(run: Run, tmp_path: Path) -> None:  # noqa: F811
    code, out, _ = run("inspect", written(tmp_path / "m.gguf", llama()[:300]))
    assert code == 1
    assert "read to     byte 300 of 300; the header cannot be understood from there on\n" in out
    assert "alignment" not in out


def test_a_pointer_is_a_finding(run: Run, tmp_path: Path) -> None:  # noqa: F811
    code, out, err = run("inspect", written(tmp_path / "m.gguf", POINTER))
    assert (code, err) == (1, "")
    assert f"format      no model, {len(POINTER)} bytes\nverdict     1 error\n" in out


def test_several_paths(run: Run, tmp_path: Path) -> None:  # noqa: F811
    sound = written(tmp_path / "sound.gguf", llama())
    cut = written(tmp_path / "cut.gguf", llama(cut=100))
    version_1 = written(tmp_path / "v1.gguf", b"GGUF" + bytes([1, 0, 0, 0]) + bytes(100))
    code, out, err = run("inspect", sound, cut)
    assert (code, err) == (1, "")
    assert [line for line in out.splitlines() if line.startswith(("file", "verdict"))] == [
        "file        sound.gguf",
        "verdict     sound",
        "file        cut.gguf",
        "verdict     1 error",
    ]
    code, out, err = run("inspect", sound, tmp_path / "none", cut)
    assert (code, err) == (3, f"{tmp_path / 'none'}: no such file or directory\n")
    assert "cut.gguf" in out
    code, out, err = run("inspect", version_1, sound)
    assert (code, err) == (5, f"{version_1}: GGUF version 1. Versions 2 and 3 are read, little-endian\n")
    assert "sound.gguf" in out


def test_json_has_the_findings(run: Run, tmp_path: Path) -> None:  # noqa: F811
    sound = written(tmp_path / "sound.gguf", llama())
    cut = written(tmp_path / "cut.gguf", llama(cut=100))
    code, out, _ = run("inspect", cut, "--json")
    facts = json.loads(out)
    assert code == 1
    assert facts["schema"] == "llamatools.inspect/1"
    assert facts["findings"] == [
        {
            "severity": "error",
            "code": "truncated",
            "file": str(cut),
            "where": "tensor 'output_norm.weight'",
            "bytes": [END - 100, END],
            "what": f"its data is bytes {END - 128} to {END}, but the file ends at {END - 100}: 100 bytes of 1 tensor "
            "are missing",
            "remedy": "The file is probably truncated",
        }
    ]
    assert (facts["header_end"], facts["data_offset"], facts["stopped_at"]) == (facts["header_end"], START, None)
    code, out, _ = run("inspect", sound, cut, "--json")
    assert code == 1
    assert [[finding["code"] for finding in report["findings"]] for report in json.loads(out)] == [[], ["truncated"]]


def test_long_values_are_shortened_unless_full(run: Run, tmp_path: Path) -> None:  # noqa: F811
    odd = key("odd", array(F32, [1.5, float("nan"), float("inf"), 2.0]))
    text = key("text", scalar(STRING, "x" * 100))
    path = written(tmp_path / "m.gguf", llama(more_keys=[odd, text]))
    _, out, _ = run("inspect", path, "--metadata", "--match", "odd|text|tokens")
    assert "['token 0', 'token 1', 'token 2', ...]" in out
    assert f"{'x' * 60}... (100 characters)" in out
    _, out, _ = run("inspect", path, "--metadata", "--full", "--match", "odd|text|tokens")
    assert f"[{', '.join(repr(f'token {n}') for n in range(40))}]" in out
    assert "[1.5, nan, inf, 2.0]" in out
    assert "x" * 100 in out
    _, out, _ = run("inspect", path, "--json", "--match", "odd")
    assert json.loads(out)["metadata"] == {"odd": {"type": "float32[4]", "value": {"items": 4}}}
    _, out, _ = run("inspect", path, "--json", "--full", "--match", "odd")
    assert json.loads(out)["metadata"]["odd"]["value"]["values"] == [1.5, "nan", "inf", 2.0]


def test_alignment_and_scan_are_asked_for(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = written(tmp_path / "m.gguf", llama()[:-128] + b"\xff" * 128)
    assert run("inspect", path)[0] == 0
    code, out, _ = run("inspect", path, "--align", "4096")
    assert code == 1
    assert "error       misaligned: tensor 'token_embd.weight': 11 of 11 tensors do not\n" in out
    code, out, err = run("inspect", path, "--align", "3")
    assert (code, out, err) == (2, "", "--align: 3 is no power of two\n")
    code, out, _ = run("inspect", path, "--scan")
    assert code == 1
    assert "error nan: tensor 'token_embd.weight': 20 of its weights are NaN; see row 1 " in " ".join(out.split())


def test_findings_of_a_table_are_prose(run: Run, tmp_path: Path) -> None:  # noqa: F811
    code, out, err = run("inspect", written(tmp_path / "m.gguf", llama(cut=100)), "--tensors")
    assert code == 1
    assert out.startswith("tensor ")
    assert err.startswith("error       truncated: ")


def test_many_findings_of_a_code_are_counted() -> None:
    findings = [Finding("hole", f"hole {n}") for n in range(9)] + [Finding("unpadded", "unpadded")]
    assert list(finding_lines(findings)) == [
        "error       hole: hole 0",
        "error       hole: hole 1",
        "error       hole: hole 2",
        "            hole: 6 more; --json lists them all",
        "note        unpadded: unpadded",
    ]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([], "sound"),
        (["unpadded"], "sound, 1 note"),
        (["trailing", "trailing"], "2 warnings"),
        (["hole", "trailing", "unpadded"], "1 error, 1 warning, 1 note"),
    ],
)
def test_verdict(codes: list[str], expected: str) -> None:
    assert verdict([Finding(code, f"{n}") for n, code in enumerate(codes)]) == expected


def test_counts() -> None:
    assert [human_count(n) for n in (0, 999_999, 134_515_008, 70_553_706_496)] == [
        "0", "999,999", "134.52 million", "70.55 billion"
    ]  # fmt: skip
