"""Importance matrices: llama.cpp's GGUF form as gguf-py writes it, the older form, and damage."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llamatools.errors import FormatError
from llamatools.formats.imatrix import read_imatrix

SUMS = np.array([[1, 2, 3, 4], [10, 20, 30, 40], [5, 6, 7, 8]], np.float32)  # three experts of four columns


def write_gguf(path: Path, tensors: dict[str, np.ndarray[Any, Any]], missing: str = "") -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    for key, add, value in (
        ("imatrix.datasets", writer.add_array, ["wiki.train.raw", "other"]),
        ("imatrix.chunk_count", writer.add_uint32, 80),
        ("imatrix.chunk_size", writer.add_uint32, 512),
    ):
        if key != missing:
            add(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def entry(name: bytes, n_calls: int, values: np.ndarray[Any, Any]) -> bytes:
    return (
        struct.pack("<i", len(name)) + name + struct.pack("<ii", n_calls, len(values)) + values.astype("<f4").tobytes()
    )


def test_sums_are_divided_by_the_counts_of_each_expert(tmp_path: Path) -> None:
    counts = np.array([[3], [0], [7]], np.float32)
    tensors = {"experts.in_sum2": SUMS, "experts.counts": counts, "experts.in_sum": SUMS, "one.in_sum2": SUMS[1:2]}
    imatrix = read_imatrix(write_gguf(tmp_path / "i.gguf", tensors | {"one.counts": np.array([[6]], np.float32)}))
    assert imatrix.importance["experts"].tolist() == [*(SUMS[0] / 3), 1, 1, 1, 1, *(SUMS[2] / 7)]
    assert imatrix.importance["one"].tolist() == (SUMS[1] / 6).tolist()
    assert all(values.dtype == np.float32 for values in imatrix.importance.values())
    assert (imatrix.datasets, imatrix.n_chunks) == (("wiki.train.raw", "other"), 80)


@pytest.mark.parametrize(
    ("end", "dataset", "n_chunks"),
    [
        (b"", (), None),
        (struct.pack("<i", 9), (), 9),
        (struct.pack("<ii", 9, 0), (), 9),
        (struct.pack("<ii", 9, 4) + b"wiki", ("wiki",), 9),
    ],
)
def test_the_older_form(tmp_path: Path, end: bytes, dataset: tuple[str, ...], n_chunks: int | None) -> None:
    data = struct.pack("<i", 2) + entry(b"a", 3, SUMS[0]) + entry(b"b", 0, SUMS[1]) + end
    (tmp_path / "i.dat").write_bytes(data)
    imatrix = read_imatrix(tmp_path / "i.dat")
    assert imatrix.importance["a"].tolist() == (SUMS[0] / np.float32(3)).tolist()
    assert imatrix.importance["b"].tolist() == SUMS[1].tolist()
    assert (imatrix.datasets, imatrix.n_chunks) == (dataset, n_chunks)


ONES = np.ones((1, 4), np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": ONES}, "no importance matrix: no tensor's name ends in '.in_sum2'. llama-imatrix of llama.cpp writes"),
        ({"x.in_sum2": ONES}, "tensor 'x': there is no 'x.counts' beside its counterpart"),
        ({"x.counts": ONES}, "tensor 'x': there is no 'x.in_sum2' beside its counterpart"),
        ({"x.in_sum2": ONES, "x.counts": ONES[:, :3]}, "tensor 'x': 4 sums do not divide into 3 counts"),
        ({"x.in_sum2": ONES, "x.counts": ONES[:, :1].astype("<f2")}, "tensor 'x.counts': F16 where F32 is required"),
        ({"x.in_sum2": ONES, "x.counts": ONES[:, :1] * np.nan}, "tensor 'x.counts': a count that is no number"),
        (
            {"x.in_sum2": ONES * np.inf, "x.counts": ONES[:, :1]},
            "tensor 'x': column 0 has importance inf, which no",
        ),
        (
            {"x.in_sum2": -ONES, "x.counts": ONES[:, :1]},
            "tensor 'x': column 0 has importance -1.0, which no",
        ),
    ],
)
def test_what_is_wrong_in_a_gguf(tmp_path: Path, tensors: dict[str, np.ndarray[Any, Any]], message: str) -> None:
    with pytest.raises(FormatError, match=rf"i\.gguf: {message}"):
        read_imatrix(write_gguf(tmp_path / "i.gguf", tensors))


@pytest.mark.parametrize("key", ["imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"])
def test_keys_that_are_required(tmp_path: Path, key: str) -> None:
    with pytest.raises(FormatError, match=f"i.gguf: no importance matrix: there is no key '{key}'"):
        read_imatrix(write_gguf(tmp_path / "i.gguf", {"x.in_sum2": ONES, "x.counts": ONES[:, :1]}, missing=key))


def test_keys_of_other_types(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "imatrix")
    writer.add_string("imatrix.datasets", "wiki")
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(FormatError, match="imatrix.datasets must be strings and imatrix.chunk_count a uint32"):
        read_imatrix(tmp_path / "i.gguf")


ONE = entry(b"a", 1, SUMS[0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header: bytes 0 to 4 are needed, but the file ends at 0"),
        (struct.pack("<i", 0) + ONE, "no importance matrix: it would have 0 entries"),
        (struct.pack("<i", -5) + ONE, "no importance matrix: it would have -5 entries"),
        (struct.pack("<i", 99) + ONE, "header: 99 entries of 17 bytes or more are announced, but at most 29 bytes"),
        (struct.pack("<i", 2) + ONE + ONE, "entry 'a': it stands twice in the file"),
        (struct.pack("<ii", 1, -1) + ONE, "entry 0: a name of -1 bytes, where 0 to 63 are allowed"),
        (struct.pack("<ii", 1, 64) + bytes(99), "entry 0: a name of 64 bytes, where 0 to 63 are allowed"),
        (struct.pack("<i", 1) + entry(b"a", 1, SUMS[0, :0]) + bytes(9), "entry 'a': it would have 0 values"),
        (struct.pack("<i", 1) + ONE[:-1], "entry 'a': bytes 17 to 33 are needed, but the file ends at 32"),
        (struct.pack("<i", 1) + entry(b"a", 1, SUMS[0] * np.nan), "tensor 'a': column 0 has importance nan"),
        (struct.pack("<i", 1) + ONE + b"xy", "number of chunks: bytes 33 to 37 are needed, but the file ends at 35"),
        (struct.pack("<i", 1) + ONE + struct.pack("<ii", 1, 9) + b"wiki", "dataset: bytes 41 to 50 are needed"),
        (struct.pack("<i", 1) + ONE + struct.pack("<ii", 1, 1) + b"wiki", "byte 42: more bytes follow where it should"),
    ],
)
def test_what_is_wrong_in_the_older_form(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(FormatError, match=rf"i\.dat: {message}"):
        read_imatrix(tmp_path / "i.dat")


def test_every_cut_is_an_error_or_ends_after_an_entry(tmp_path: Path) -> None:
    """A cut may end where the parts that may be missing begin; anywhere else the file is refused."""
    data = struct.pack("<i", 2) + ONE + entry(b"b", 2, SUMS[1]) + struct.pack("<ii", 8, 4) + b"wiki"
    whole = []
    for n in range(len(data)):
        (tmp_path / "i.dat").write_bytes(data[:n])
        try:
            read_imatrix(tmp_path / "i.dat")
            whole.append(n)
        except FormatError:
            pass
    assert whole == [len(data) - 12, len(data) - 8]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="i.dat: no such file or directory"):
        read_imatrix(tmp_path / "i.dat")
