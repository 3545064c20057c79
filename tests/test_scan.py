"""Weights that no model has, planted in files by gguf-py and safetensors and judged by gguf-py's decoding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

import llamatools
from llamatools.check.scan import REACH, numbers_of, scan
from llamatools.dtypes import BY_NAME

Q = gguf.GGMLQuantizationType
SCALES = [(name, field) for name, fields in REACH.items() for field in fields]


def gguf_of(path: Path, tensors: dict[str, tuple[NDArray[Any], gguf.GGMLQuantizationType]]) -> llamatools.Layout:
    writer = gguf.GGUFWriter(path, "llama")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return llamatools.inspect(path)


def safetensors_of(path: Path, tensors: dict[str, torch.Tensor]) -> llamatools.Layout:
    save_file(tensors, path)
    return llamatools.inspect(path)


def lines(layout: llamatools.Layout, threads: int = 2) -> list[str]:
    return [f"{finding.code}: {finding}" for finding in scan(layout, threads=threads)]


def random_blocks(name: str, n_rows: int, **scales: float) -> NDArray[np.uint8]:
    """Rows of two blocks, random but for scales of 0.01, or as given in the third row's last block."""
    draws = np.random.default_rng(1)
    dtype = BY_NAME[name]
    blocks = np.frombuffer(draws.bytes(2 * n_rows * dtype.block_nbytes), dtype.block).reshape(n_rows, 2).copy()
    for field in REACH[name]:
        blocks[field] = 0.01
        blocks[field][2, 1] = scales.get(field, 0.01)
    return blocks.view(np.uint8)


@pytest.mark.parametrize(("name", "field"), SCALES)
@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 60000.0])
def test_scales(name: str, field: str, scale: float, tmp_path: Path) -> None:
    data = random_blocks(name, 4, **{field: scale})
    layout = gguf_of(
        tmp_path / "m.gguf", {"sound": (random_blocks(name, 4), getattr(Q, name)), "odd": (data, getattr(Q, name))}
    )
    code, are = ("nan", "are NaN") if math.isnan(scale) else ("infinite", "are infinite")
    if math.isfinite(scale):
        code, are = "huge", "make weights beyond 65504, which float16 cannot hold"
    if code == "huge" and REACH[name][field] == 1:
        assert lines(layout) == []
        return
    (finding,) = scan(layout, threads=1)
    assert f"{finding.code}: {finding}" == f"{code}: tensor 'odd': 1 of its scales {are}; see row 2"
    odd = layout.tensors[1]
    assert finding.span == (odd.offset + odd.nbytes // 2, odd.offset + odd.nbytes * 3 // 4)
    with np.errstate(all="ignore"):
        assert not np.isfinite(gguf.quants.dequantize(data, getattr(Q, name))).all() or code == "huge"


@pytest.mark.parametrize("name", REACH)
def test_no_weight_reaches_further_than_its_scales_say(name: str) -> None:
    """And the bound is met to a third by random blocks, so it is none of another size."""
    data = random_blocks(name, 400)
    weights = np.abs(gguf.quants.dequantize(data, getattr(Q, name)))
    bound = sum(0.01 * reach for reach in REACH[name].values())
    assert bound / 3 < weights.max() <= bound * 1.001


def test_scales_of_mxfp4(tmp_path: Path) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (4, 17), np.uint8)
    for exponent, expected in (
        (100, []),
        (255, ["nan: tensor 't': 1 of its scales are NaN; see row 3"]),
        (200, ["huge: tensor 't': 1 of its scales make weights beyond 65504, which float16 cannot hold; see row 3"]),
    ):
        blocks[:, 0] = 100
        blocks[3, 0] = exponent
        assert lines(gguf_of(tmp_path / "m.gguf", {"t": (blocks, Q.MXFP4)})) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: torch.randn(5, 7, dtype=dtype) for name in ("nan", "infinite", "sound")}
    tensors["zero"] = torch.zeros(5, 7, dtype=dtype)
    tensors["zero"][1, 1] = -0.0
    tensors["nan"][3, 2] = -math.nan
    tensors["nan"][4] = math.nan
    tensors["infinite"][1:3, 1] = -math.inf
    expected = {
        "nan: tensor 'nan': 8 of its weights are NaN; see row 3",
        "infinite: tensor 'infinite': 2 of its weights are infinite; see row 1",
        "zero-tensor: tensor 'zero': all of its 35 weights are zero",
    }
    if dtype != torch.float16:
        tensors["huge"] = torch.full((5, 7), 65000.0, dtype=dtype)
        tensors["huge"][0, 0] = -66000.0
        expected.add(
            "huge: tensor 'huge': 1 of its weights make weights beyond 65504, which float16 cannot hold; see row 0"
        )
    assert set(lines(safetensors_of(tmp_path / "m.safetensors", tensors))) == expected


def test_dtypes_that_are_known_by_size_only(tmp_path: Path) -> None:
    integers = np.ones((2, 4), np.int32)
    layout = gguf_of(tmp_path / "m.gguf", {"t": (np.ones((2, 66), np.uint8), Q.IQ2_XXS), "u": (integers, Q.I32)})
    assert lines(layout) == ["not-scanned: the data of I32, IQ2_XXS tensors were not looked into"]


def test_every_chunk_is_read_and_rows_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamatools.check.scan.CHUNK", 64)
    weights = torch.randn(100, 8)
    weights[97, 3] = math.nan
    layout = safetensors_of(tmp_path / "m.safetensors", {"a": weights, "b": torch.randn(50, 8)})
    told: list[tuple[int, int]] = []
    (finding,) = scan(layout, threads=3, on_progress=lambda done, total: told.append((done, total)))
    assert str(finding) == "tensor 'a': 1 of its weights are NaN; see row 97"
    assert told[-1] == (4800, 4800)
    assert len(told) == 75


def test_what_is_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(10), "b": torch.full((10,), math.nan)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert lines(llamatools.inspect(path)) == []


def test_every_dtype_that_can_be_decoded_is_looked_into() -> None:
    assert [dtype.name for dtype in BY_NAME.values() if dtype.decode and not numbers_of(dtype)] == []
