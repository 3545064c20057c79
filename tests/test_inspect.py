"""Damaged files, shown as far as they make sense; files that other tools made, and what is found in them."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_files import data_start, llama, written
from test_gguf_malformed import ACCEPTED, REFUSED, is_header_only
from tiny_llamas import TINY, random_weights, write_gguf

import llamatools
from llamatools import overview, views
from llamatools.errors import FormatError, LlamatoolsError, Report, refuse
from llamatools.formats.gguf import read_gguf

Q = gguf.GGMLQuantizationType
START = data_start()
HEADER_END = data_start({"alignment": 1})
WHOLE = "The data is whole: `llamatools convert` lays it out anew"


def test_where_reading_stopped(tmp_path: Path) -> None:
    for size in range(24, START, 13):
        layout = llamatools.inspect(written(tmp_path / "cut.gguf", llama()[:size]))
        (problem,) = layout.problems
        assert problem.code in ("truncated", "damaged")
        if size < HEADER_END:
            assert layout.stopped_at is not None
            assert layout.stopped_at <= size
        else:
            assert layout.stopped_at is None
            assert len(layout.tensors) == 11


# ---- files by other tools ----


@pytest.mark.parametrize("matrices", [Q.F32, Q.F16, Q.Q4_0, Q.Q8_0])
def test_what_gguf_py_writes_is_sound(matrices: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    layout = llamatools.inspect(write_gguf(tmp_path / "m.gguf", random_weights(TINY), TINY, matrices=matrices))
    assert llamatools.findings(layout) == []
    assert llamatools.scan(layout) == []


def test_the_fixture_is_sound() -> None:
    layout = llamatools.inspect(Path(__file__).parents[1] / "fixtures" / "tiny-llama")
    assert llamatools.findings(layout) == []
    assert [finding.code for finding in llamatools.scan(layout)] == []


def rewritten_by_llama_quantize(path: Path) -> None:
    """What llama-quantize and llama-gguf-split make of a file by gguf-py: its keys, but all padding to 32.

    Every part is where gguf-py says; only offsets and padding are ours.
    """
    reader = gguf.GGUFReader(path)
    data = path.read_bytes()
    header, body, offset = bytearray(data[: reader.data_offset]), b"", 0
    for tensor in reader.tensors:
        field = tensor.field.parts[tensor.field.data[-1]]  # the offset is the last part of a tensor's entry
        position = tensor.field.offset + sum(part.nbytes for part in tensor.field.parts) - 8
        assert int(field[0]) == int.from_bytes(header[position : position + 8], "little")
        header[position : position + 8] = offset.to_bytes(8, "little")
        body += tensor.data.tobytes() + bytes(-tensor.n_bytes % 32)
        offset += tensor.n_bytes + -tensor.n_bytes % 32
    end = position + 8
    path.write_bytes(header[:end] + bytes(-end % 32) + body)


@pytest.mark.parametrize("dim", [52, 1024], ids=["offsets differ", "offsets fit both"])
def test_what_llama_quantize_makes_of_other_alignments(dim: int, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    draws = np.random.default_rng(0)
    tensors = {name: draws.standard_normal((3, dim), np.float32) for name in ("a", "b", "c")}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(4096)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert [problem.code for problem in llamatools.inspect(path).problems] == ["key-missing"]
    rewritten_by_llama_quantize(path)

    layout = llamatools.inspect(path)
    assert str(layout.problems[0]) == (
        f"{path}: key 'general.alignment': the tensors' offsets are the running sum for 32, but general.alignment says "
        f"4096. {WHOLE}"
    )
    for tensor in layout.tensors:  # and they are found all the same
        assert tensor.source is not None
        assert tensor.source.read(0, 3).tobytes() == tensors[tensor.name].tobytes()
    with pytest.raises(FormatError, match="the running sum for 32, but general.alignment says 4096"):
        llamatools.open(path)


def test_later_files_of_a_set_by_gguf_py(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "set.gguf", "llama", split_max_tensors=2)
    writer.add_custom_alignment(4096)
    for n in range(4):
        writer.add_tensor(f"t{n}", np.full((3, 5), n + 1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, second = sorted(tmp_path.iterdir())
    with pytest.raises(FormatError, match="running sum for 4096, but general.alignment is not stated, which means 32"):
        read_gguf(second)
    problems: list[LlamatoolsError] = []
    layout = read_gguf(second, report=problems.append)
    assert [problem.code for problem in problems] == ["alignment-mismatch"]
    sources = [tensor.source for tensor in layout.tensors if tensor.source]
    assert [source.read(0, 3).tolist() for source in sources] == [[[n] * 5] * 3 for n in (3.0, 4.0)]


# ---- the strict reader and the tolerant one ----


@pytest.mark.parametrize("name", [*REFUSED, *ACCEPTED])
def test_the_first_problem_is_what_is_refused(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", REFUSED[name][0] if name in REFUSED else ACCEPTED[name])
    told: list[LlamatoolsError] = []
    strict, raised = _refusal(path, name, refuse), _refusal(path, name, told.append)
    tolerant = told[0] if told else raised  # raised where nothing can be shown
    assert (type(strict), str(strict)) == (type(tolerant), str(tolerant))
    assert (strict is None) == (name in ACCEPTED)


def _refusal(path: Path, name: str, report: Report) -> LlamatoolsError | None:
    try:
        read_gguf(path, header_only=is_header_only(name), report=report)
    except LlamatoolsError as error:
        return error
    return None


def test_any_damage_is_shown_or_refused(tmp_path: Path) -> None:
    draws = random.Random(7)
    path = tmp_path / "model.gguf"
    n_shown = 0
    for _ in range(100):
        data = bytearray(llama())
        for _ in range(draws.choice((1, 2, 4))):
            at = draws.randrange(START)
            if draws.randrange(2):
                data[at] ^= 1 << draws.randrange(8)
            else:
                data[at : at + 8] = struct.pack("<Q", draws.choice((0, 1, 31, 2**16, 2**32, 2**63, 2**64 - 1)))
        path.write_bytes(data)
        try:
            layout = llamatools.inspect(path)
        except LlamatoolsError:  # no GGUF any more, or another version
            continue
        n_shown += 1
        for line in overview.overview(layout, llamatools.findings(layout)):
            assert len(line) <= 80
            assert line.isprintable()
        views.tensor_table(layout), views.metadata_table(layout, full=True)
        json.dumps(views.as_json(layout, findings=llamatools.findings(layout), full=True), allow_nan=False)
        if not layout.problems:
            llamatools.scan(layout)
    assert n_shown > 80
