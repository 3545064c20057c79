"""Quantizing whole files: each tensor against ggml's C, the rest against gguf-py and llama.cpp."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import gguf
import llamacpp
import numpy as np
import pytest
import torch
from meta_checkpoints import params_of, write_meta
from tiny_llamas import Weights, random_weights, write_gguf

import llamatools
from llamatools import MetaOptions, Overrides, QuantizeOptions, reports
from llamatools.checkpoint import Hyperparameters
from llamatools.dtypes import BF16
from llamatools.errors import FormatError, UsageError
from llamatools.provenance import recorded_digests

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
OPTIONS = MetaOptions(overrides=Overrides(context=64))
WIDE = Hyperparameters(  # rows of 256, which every block type divides, but for ffn_down
    dim=256, hidden_dim=288, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64,
    vocab_size=300, norm_eps=1e-5, rope_theta=10000.0, max_seq_len=64,
)  # fmt: skip
BF = gguf.GGMLQuantizationType.BF16


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Of WIDE, each a bfloat16 number."""
    drawn = random_weights(WIDE)
    return {
        name: BF16.decode(BF16.encode(array.reshape(-1, array.shape[-1]), None)).reshape(array.shape)
        for name, array in drawn.items()
    }


@pytest.fixture(scope="module")
def source(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("source") / "wide.gguf", weights, WIDE, matrices=BF)


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def floats(tensor: gguf.ReaderTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


@pytest.mark.parametrize("recipe", ["q4_0", "q4_k_m", "iq4_xs"])
def test_every_tensor_has_the_bytes_of_ggml(source: Path, tmp_path: Path, recipe: str) -> None:
    done = llamatools.quantize(source, tmp_path / "q.gguf", recipe)
    originals = tensors_of(source)
    for name, tensor in tensors_of(tmp_path / "q.gguf").items():
        original = originals[name]
        if len(original.shape) == 1:
            assert bytes(tensor.data) == bytes(original.data), name
        else:
            expected = llamacpp.quantize(tensor.tensor_type, floats(original))
            assert tensor.data.tobytes() == expected.tobytes(), name
    assert {change.after.name for change in done.changes} > {"F32", "Q6_K"}


@pytest.mark.parametrize("recipe", ["q8_0", "q4_k_m"])
@pytest.mark.parametrize("alignment", [32, 4096])
def test_one_pass_gives_the_file_of_two_steps(
    weights: Weights, tmp_path: Path, sentencepiece_model: bytes, recipe: str, alignment: int
) -> None:
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    meta = write_meta(tmp_path / "m", state, params_of(WIDE), sentencepiece_model, n_shards=2, dtype=torch.bfloat16)
    llamatools.convert(meta, tmp_path / "auto.gguf", options=OPTIONS, alignment=alignment)
    llamatools.quantize(tmp_path / "auto.gguf", tmp_path / "two.gguf", recipe)
    llamatools.convert(meta, tmp_path / "one.gguf", options=OPTIONS, alignment=alignment, dtype=recipe)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


@pytest.mark.parametrize("asked", [None, 32, 64, 1 << 21])
def test_alignment_is_kept_or_changed(source: Path, tmp_path: Path, asked: int | None) -> None:
    aligned = tmp_path / "aligned.gguf"
    llamatools.quantize(source, aligned, "q8_0", alignment=4096)
    done = llamatools.quantize(aligned, tmp_path / "q.gguf", "q8_0", alignment=asked)
    expected = asked or 4096
    assert done.layout.alignment == expected
    reader = gguf.GGUFReader(tmp_path / "q.gguf")
    assert all(tensor.data_offset % expected == 0 for tensor in reader.tensors)
    for name, tensor in tensors_of(aligned).items():
        assert bytes(tensors_of(tmp_path / "q.gguf")[name].data) == bytes(tensor.data)


def test_metadata_is_carried_over(weights: Weights, tmp_path: Path) -> None:
    extra = {"general.file_type": 32, "general.name": "A name", "split.count": 1, "x.y": [1, 2]}
    source = write_gguf(tmp_path / "s.gguf", weights, WIDE, matrices=BF, extra=extra)
    llamatools.quantize(source, tmp_path / "q.gguf", "q4_0")
    before, after = (
        {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF")}
        for path in (source, tmp_path / "q.gguf")
    )
    added = {key: value for key, value in after.items() if before.get(key) != value}
    assert set(before) - set(after) == {"split.count"}
    assert added.pop("general.file_type") == 2
    assert added.pop("general.quantization_version") == gguf.GGML_QUANT_VERSION
    assert added.pop("llamatools.source.files") == ["s.gguf"]
    assert added.pop("llamatools.source.sizes") == [source.stat().st_size]
    assert all(key.startswith(("llamatools.tensor.", "llamatools.version")) for key in added)


def test_digests(source: Path, tmp_path: Path) -> None:
    llamatools.quantize(source, tmp_path / "q.gguf", "q4_k_s")
    recorded = recorded_digests(llamatools.inspect(tmp_path / "q.gguf").metadata)
    for name, tensor in tensors_of(tmp_path / "q.gguf").items():
        assert recorded[name].sha256 == hashlib.sha256(tensor.data.tobytes()).hexdigest()


def test_same_bytes_for_any_number_of_threads(source: Path, tmp_path: Path) -> None:
    for threads in (1, 2, 7):
        llamatools.quantize(source, tmp_path / f"{threads}.gguf", "q4_k_m", threads=threads)
    assert len({(tmp_path / f"{threads}.gguf").read_bytes() for threads in (1, 2, 7)}) == 1


def test_dry_run_plans_the_very_file(source: Path, tmp_path: Path) -> None:
    planned = llamatools.quantize(source, tmp_path / "q.gguf", "q4_k_m", dry_run=True)
    assert not (tmp_path / "q.gguf").exists()
    llamatools.quantize(source, tmp_path / "q.gguf", "q4_k_m")
    assert planned.layout.size == (tmp_path / "q.gguf").stat().st_size
    tensors = gguf.GGUFReader(tmp_path / "q.gguf").tensors
    assert [(t.name, t.offset) for t in planned.layout.tensors] == [(t.name, t.data_offset) for t in tensors]


@pytest.mark.parametrize(("value", "said"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize(
    ("tensor", "place"), [("layers.1.feed_forward.w1.weight", (287, 255)), ("norm.weight", (0, 7))]
)
def test_what_is_no_number_is_refused(
    weights: Weights, tmp_path: Path, value: float, said: str, tensor: str, place: tuple[int, int]
) -> None:
    damaged = {name: array.copy() for name, array in weights.items()}
    damaged[tensor].reshape(-1, 256)[place] = value
    source = write_gguf(tmp_path / "s.gguf", damaged, WIDE, matrices=BF)
    with pytest.raises(FormatError, match=f"row {place[0]}, column {place[1]} is {said}, which is no number. The file"):
        llamatools.quantize(source, tmp_path / "q.gguf", "q4_0")
    assert os.listdir(tmp_path) == ["s.gguf"]


def test_weights_too_large_for_a_block_are_refused(weights: Weights, tmp_path: Path) -> None:
    large = {name: array.copy() for name, array in weights.items()}
    large["output.weight"][3, 40] = 3e9
    source = write_gguf(tmp_path / "s.gguf", large, WIDE, matrices=BF)
    with pytest.raises(FormatError, match=r"row 3, column \d+, .*too large for Q4_0, whose scales end at 65504"):
        llamatools.quantize(source, tmp_path / "q.gguf", "q4_0", options=QuantizeOptions(pure=True))
    options = QuantizeOptions(output_type="bf16")
    llamatools.quantize(source, tmp_path / "q.gguf", "q4_0", options=options)


def test_quantized_weights_are_quantized_again_only_when_asked(source: Path, tmp_path: Path) -> None:
    llamatools.quantize(source, tmp_path / "q8.gguf", "q8_0")
    with pytest.raises(UsageError, match="its weights are Q8_0 already; making Q4_0 of them adds an error"):
        llamatools.quantize(tmp_path / "q8.gguf", tmp_path / "q.gguf", "q4_0")
    done = llamatools.quantize(
        tmp_path / "q8.gguf", tmp_path / "q.gguf", "q4_0", options=QuantizeOptions(allow_requantize=True)
    )
    assert any(line.startswith("requantized 16 tensors of Q8_0") for line in reports.lines(done))
    originals = tensors_of(tmp_path / "q8.gguf")
    for name, tensor in tensors_of(tmp_path / "q.gguf").items():
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0:
            expected = llamacpp.quantize(tensor.tensor_type, floats(originals[name]))
            assert tensor.data.tobytes() == expected.tobytes(), name
