"""Our reader of safetensors, held against the safetensors package both ways: what it writes, and what it accepts."""

from __future__ import annotations

import json
import random
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llamatools.errors import FormatError, LlamatoolsError, UnsupportedError
from llamatools.formats.safetensors import read_safetensors
from llamatools.metadata import Kind

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode().ljust(192)  # so data begin at 200
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def is_accepted_by_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "np"):
            return True
    except SafetensorError:
        return False


TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def test_what_the_safetensors_package_wrote(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(3, 4, 8), (5,), (), (0, 7), (2, 8)]
    tensors = {
        f"{name} {shape}": torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=draws)
        .view(dtype)
        .reshape(shape)
        for name, dtype in TORCH_DTYPES.items()
        for shape in shapes
    }
    path = tmp_path / "all.safetensors"
    save_file(tensors, path, {"format": "pt", "Zoë": "🐲\n"})

    layout = read_safetensors(path)
    assert (layout.format, layout.alignment, layout.size) == ("safetensors", None, path.stat().st_size)
    assert {key: (value.kind, value.data) for key, value in layout.metadata.items()} == {
        "format": (Kind.STRING, "pt"),
        "Zoë": (Kind.STRING, "🐲\n"),
    }
    assert {tensor.name for tensor in layout.tensors} == tensors.keys()
    assert list(layout.tensors) == sorted(layout.tensors, key=lambda tensor: tensor.offset)
    assert layout.data_offset == layout.tensors[0].offset
    for placed in layout.tensors:
        original = tensors[placed.name]
        data = original.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert placed.shape == original.shape
        assert placed.dtype.name == placed.name.split()[0]
        assert path.read_bytes()[placed.offset : placed.end] == data
        assert placed.source is not None
        assert placed.source.read(0, placed.source.n_rows).tobytes() == data


def test_a_file_without_tensors_and_spaces_after_the_header(tmp_path: Path) -> None:
    path = file_of(tmp_path / "empty.safetensors", b"{}" + b" " * 30)
    assert is_accepted_by_safetensors(path)
    assert read_safetensors(path).tensors == ()


def test_tensors_are_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    nothing = {"dtype": "F32", "shape": [0, 2**60], "data_offsets": [8, 8]}
    header = {"c": F32 | {"data_offsets": [8, 16]}, "b": nothing, "a": F32}
    path = file_of(tmp_path / "unordered.safetensors", header, bytes(range(16)))
    assert is_accepted_by_safetensors(path)
    layout = read_safetensors(path)
    tensors, start = layout.tensors, layout.data_offset or 0
    assert [(tensor.name, tensor.offset - start) for tensor in tensors] == [("a", 0), ("b", 8), ("c", 8)]
    assert [tensor.source and tensor.source.read(0, tensor.source.n_rows).size for tensor in tensors] == [2, 0, 2]


LIST = f"must be a list of integers from 0 to {2**63 - 1}"
TEXTS = "__metadata__: it must map names to texts"
FIELDS = "tensor 'a': dtype, shape and data_offsets are required, and nothing else"

# The header, the bytes after it, what is said of it.
REFUSED: dict[str, tuple[bytes | dict[str, Any], bytes, str]] = {
    "no JSON": (b'{"a":', b"", "header: it is no JSON (Expecting value: line 1 column 6 (char 5)). The file is dam"),
    "no UTF-8": (b'{"\xff":1}', b"", "header: it is no JSON ('utf-8' codec can't decode byte 0xff in position 2"),
    "NaN": (b'{"a":NaN}', b"", "header: it is no JSON (NaN stands in it)"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", "header: it is nested too deeply"),
    "long number": (b'{"a":' + b"1" * 5000 + b"}", b"", "header: it is no JSON (Exceeds the limit (4300 digits)"),
    "name twice": (
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        bytes(4),
        "header: the key 'a' stands twice in one object",
    ),
    "metadata twice": (b'{"__metadata__":{"k":"1","k":"2"}}', b"", "header: the key 'k' stands twice in one object"),
    "metadata list": ({"__metadata__": []}, b"", TEXTS),
    "metadata null": ({"__metadata__": None}, b"", TEXTS),
    "metadata number": ({"__metadata__": {"k": 1}}, b"", TEXTS),
    "metadata surrogate": (b'{"__metadata__":{"k":"\\udc80"}}', b"", "__metadata__ key 'k': half a surrogate pair st"),
    "name surrogate": ({"\ud800": F32}, bytes(8), "half a surrogate pair stands in a text"),
    "entry text": ({"a": "F32"}, b"", FIELDS),
    "field missing": ({"a": {"dtype": "F32", "shape": []}}, b"", FIELDS),
    "field unknown": ({"a": F32 | {"scale": 2}}, bytes(8), FIELDS),
    "dtype unknown": ({"a": F32 | {"dtype": "Q4_0"}}, bytes(8), "tensor 'a': unknown dtype 'Q4_0'"),
    "dtype list": ({"a": F32 | {"dtype": ["F32"]}}, bytes(8), "tensor 'a': unknown dtype ['F32']"),
    "shape number": ({"a": F32 | {"shape": 2}}, bytes(8), f"tensor 'a': its shape {LIST}"),
    "shape negative": ({"a": F32 | {"shape": [-2, -1]}}, bytes(8), f"its shape {LIST}"),
    "shape float": ({"a": F32 | {"shape": [2.0]}}, bytes(8), f"its shape {LIST}"),
    "shape truth": ({"a": F32 | {"shape": [2, True]}}, bytes(8), f"its shape {LIST}"),
    "shape huge": ({"a": F32 | {"shape": [2**62, 2**62, 0]}}, b"", "has more weights than can be counted"),
    "offsets text": ({"a": F32 | {"data_offsets": "08"}}, bytes(8), f"its data_offsets {LIST}"),
    "offsets three": ({"a": F32 | {"data_offsets": [0, 4, 8]}}, bytes(8), "its data_offsets are [0, 4, 8], which are"),
    "offsets swapped": ({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8), "its data_offsets are [8, 0], which are no"),
    "size": ({"a": F32 | {"shape": [3]}}, bytes(8), "tensor 'a': F32 [3] takes 12 bytes, but is given 8"),
    "hole at the start": (
        {"a": F32 | {"data_offsets": [4, 12]}},
        bytes(12),
        "tensor 'a': its data begin at byte 204, but the header ends at 200: a hole",
    ),
    "hole": (
        {"a": F32, "b": F32 | {"data_offsets": [12, 20]}},
        bytes(20),
        "tensor 'b': its data begin at byte 212, but tensor 'a' ends at 208: a hole",
    ),
    "overlap": (
        {"a": F32, "b": F32 | {"data_offsets": [4, 12]}},
        bytes(12),
        "tensor 'b': its data begin at byte 204, but tensor 'a' ends at 208: an overlap",
    ),
    "bytes left over": (
        {"a": F32},
        bytes(9),
        "tensor 'a' ends at byte 208, but the file at 209: bytes that belong to no tensor",
    ),
    "one byte short": (
        {"a": F32},
        bytes(7),
        "tensor 'a': its data is bytes 200 to 208, but the file ends at 207. The file is probably truncated",
    ),
}
STRICTER = {"name twice", "metadata twice", "metadata null", "field unknown"}  # than the safetensors package


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    header, data, said = REFUSED[case]
    path = file_of(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(FormatError, match=re.escape(said)) as error:
        read_safetensors(path)
    assert str(error.value).startswith(f"{path}: ")
    assert is_accepted_by_safetensors(path) is (case in STRICTER)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_weights_that_share_bytes(dtype: str, tmp_path: Path) -> None:
    path = file_of(tmp_path / "packed.safetensors", {"a": F32 | {"dtype": dtype}}, bytes(8))
    with pytest.raises(UnsupportedError, match=f"tensor 'a': {dtype} weights, which share bytes, are not supported"):
        read_safetensors(path)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for data, said in (
        (b"", "the file is empty. Download it again"),
        (b"<!DOCTYPE html><html>", "a web page of 21 bytes, not a model"),
        (b"GGUF\x03\x00\x00\x00\x00", r"no safetensors file: it begins with b'GGUF"),
        (b"\x02\x00\x00", r"no safetensors file: it begins with b'\x02\x00\x00'"),
        (struct.pack("<Q", 100_000_001) + b"{", "header: its length is 100000001 bytes, where 100000000 are allowed"),
        (struct.pack("<Q", 20) + b"{}", "header: it is bytes 8 to 28, but the file ends at 10. The file is probably"),
    ):
        path.write_bytes(data)
        assert not is_accepted_by_safetensors(path)
        with pytest.raises(FormatError, match=re.escape(said)):
            read_safetensors(path)
    with pytest.raises(FormatError, match="no such file or directory"):
        read_safetensors(tmp_path / "none")


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.safetensors"
    save_file(
        {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.empty(0, 3)},
        path,
        {"format": "pt"},
    )
    return path


def test_cut_anywhere(sound: Path) -> None:
    data = sound.read_bytes()
    assert len(read_safetensors(sound).tensors) == 3
    for size in range(len(data)):
        sound.write_bytes(data[:size])
        with pytest.raises(FormatError):
            read_safetensors(sound)


def test_what_is_accepted_after_damage_the_safetensors_package_accepts(sound: Path) -> None:
    data = sound.read_bytes()
    draws = random.Random(7)
    n_accepted = 0
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(draws.randint(1, 3)):
            damaged[draws.randrange(len(data) - 32)] = draws.choice(b'0123456789,:"[]{}abF') or draws.randrange(256)
        sound.write_bytes(damaged)
        try:
            layout = read_safetensors(sound)
        except LlamatoolsError:
            continue
        n_accepted += 1
        with safe_open(sound, "pt") as theirs:
            assert {t.name: list(t.shape) for t in layout.tensors} == {
                name: theirs.get_slice(name).get_shape() for name in sorted(theirs.keys())
            }
    assert n_accepted > 100


def test_many_tensors(tmp_path: Path) -> None:
    entries = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(20_000)}
    path = file_of(tmp_path / "many.safetensors", entries, np.arange(20_000, dtype=np.uint8).tobytes())
    assert is_accepted_by_safetensors(path)
    layout = read_safetensors(path)
    assert layout.n_weights == 20_000
