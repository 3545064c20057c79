"""Quantizing whole files: each tensor against ggml's C, the rest against gguf-py and llama.cpp."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import llamacpp
import numpy as np
import pytest
import torch
from imatrix_files import write_imatrix
from meta_checkpoints import params_of, write_meta
from tiny_llamas import Weights, random_weights, write_gguf

import llamatools
from llamatools import MetaOptions, Overrides, QuantizeOptions, reports
from llamatools.checkpoint import Hyperparameters
from llamatools.dtypes import BF16, F32, named
from llamatools.errors import FormatError, UnsupportedError, UsageError
from llamatools.provenance import recorded_digests
from llamatools.tensors import ArrayTensor, Cast

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


def test_an_alignment_below_32_is_raised_and_told(tmp_path: Path) -> None:
    """Files of the time before 32 was the least are read, but none is written."""
    weights = np.arange(4 + 64, dtype="<f4")
    header = gguf_files.build(
        [
            gguf_files.key("general.architecture", gguf_files.scalar(gguf_files.STRING, "other")),
            gguf_files.key("general.alignment", gguf_files.scalar(gguf_files.U32, 16)),
        ],
        [gguf_files.Tensor("a", 0, (4, 1)), gguf_files.Tensor("b", 0, (32, 2))],
        alignment=16,
        data=False,
    )
    (tmp_path / "s.gguf").write_bytes(header + weights.tobytes())
    (tmp_path / "recipe").write_text(". = keep\n")
    done = llamatools.quantize(tmp_path / "s.gguf", tmp_path / "q.gguf", tmp_path / "recipe")
    assert [f"{note.what} {note.value}: {note.reason}" for note in done.notes] == [
        "alignment 32: the source's is 16, which is not written"
    ]
    tensors = gguf.GGUFReader(tmp_path / "q.gguf").tensors
    assert [tensor.data_offset % 32 for tensor in tensors] == [0, 0]
    assert np.concatenate([tensor.data.ravel() for tensor in tensors]).tolist() == weights.tolist()
    done = llamatools.quantize(tmp_path / "s.gguf", tmp_path / "q.gguf", tmp_path / "recipe", alignment=64, force=True)
    assert done.notes == ()


def test_metadata_is_carried_over(weights: Weights, tmp_path: Path) -> None:
    extra = {"general.file_type": 32, "general.name": "A name", "x.y": [1, 2]}
    source = write_gguf(tmp_path / "s.gguf", weights, WIDE, matrices=BF, extra=extra)
    llamatools.quantize(source, tmp_path / "q.gguf", "q4_0")
    before, after = (
        {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF")}
        for path in (source, tmp_path / "q.gguf")
    )
    added = {key: value for key, value in after.items() if before.get(key) != value}
    assert not set(before) - set(after)
    assert added.pop("general.file_type") == 2
    assert added.pop("general.quantization_version") == gguf.GGML_QUANT_VERSION
    assert added.pop("llamatools.source.files") == ["s.gguf"]
    assert added.pop("llamatools.source.sizes") == [source.stat().st_size]
    assert all(key.startswith(("llamatools.tensor.", "llamatools.version")) for key in added)


def damaged(source: Path, path: Path, name: str) -> Path:
    """A copy in which a bit of the tensor's first byte is another."""
    data = bytearray(source.read_bytes())
    data[tensors_of(source)[name].data_offset] ^= 1
    path.write_bytes(data)
    return path


def test_a_source_is_held_against_the_digests_inside(source: Path, tmp_path: Path) -> None:
    whole, destination = tmp_path / "whole.gguf", tmp_path / "q.gguf"
    with pytest.raises(UsageError, match=r"wide.gguf: --verify-source: no digests of its weights are stored in it"):
        llamatools.quantize(source, destination, "q4_0", verify=True)
    llamatools.convert(source, whole)
    done = llamatools.quantize(whole, destination, "q4_0", verify=True)
    assert done.verified == ("21 of 21 tensors: SHA-256 as stored",)
    plain = llamatools.quantize(whole, tmp_path / "plain.gguf", "q4_0")
    assert plain.verified == ()
    assert destination.read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    copied, quantized = (damaged(whole, tmp_path / f"{n}.gguf", f"blk.1.{n}.weight") for n in ("ffn_norm", "ffn_up"))
    for path, verify in ((copied, False), (copied, True), (quantized, True)):
        message = rf"{path.name}: tensor 'blk.1.{path.stem}.weight': its bytes have the SHA-256 \w+, but \w+ was stored"
        with pytest.raises(FormatError, match=message):
            llamatools.quantize(path, tmp_path / "no.gguf", "q4_0", verify=verify)
    assert not list(tmp_path.glob("*no.gguf*"))
    llamatools.quantize(quantized, tmp_path / "unseen.gguf", "q4_0")


def test_a_set_of_files_becomes_one(weights: Weights, source: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "set.gguf", "llama", split_max_tensors=7)
    for key, field in gguf.GGUFReader(source).fields.items():
        if not key.startswith(("GGUF", "general.arch")):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for tensor in gguf.GGUFReader(source).tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(tmp_path.iterdir())
    assert len(shards) == 3
    llamatools.quantize(shards[1], tmp_path / "q.gguf", "q4_0")
    llamatools.quantize(source, tmp_path / "whole.gguf", "q4_0")
    assert digest(tmp_path / "q.gguf") == digest(tmp_path / "whole.gguf")
    fields = gguf.GGUFReader(tmp_path / "q.gguf").fields
    assert not any(key.startswith("split.") for key in fields)
    assert fields["llamatools.source.files"].contents() == [path.name for path in shards]


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


def columns_of(path: Path) -> dict[str, int]:
    """The matrices that llama-imatrix measures, each with the length of its rows."""
    return {
        tensor.name: int(tensor.shape[0])
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    }


def digest(path: Path) -> str:
    """SHA-256 of all tensors' names, dtypes and bytes, in the order of their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors_of(path).items()):
        total.update(f"{name} {tensor.tensor_type.name} ".encode() + tensor.data.tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    llamatools.convert(FIXTURE, path, options=MetaOptions(overrides=Overrides(context=1024)), name="Tiny LLaMA")
    return path


# Of the files that llama-quantize (b11434, x86-64) makes of the same GGUF; without and with the same imatrix.
FROZEN = {
    "q4_0": "79a69a2ad671682bb4d60983ba4ad791080d85afc93cbed00b25fe10f9ad58b4",
    "q4_1": "4a6ab7a52a8852381952df76f024545d3cb44fb7837e1233b0bc267fc7d2b1ae",
    "q5_0": "63ecf55173a2b273d775436e94295cb5e7fea9184a5b1c1f23c71163df5c992c",
    "q5_1": "7359a30de47172d27ae98622a8183dd48e2a7ff1b60b5b1661557e8c6464570f",
    "q8_0": "30c7e770d3bbca314ba357bb51ab1e49f141275b757e868cba697ad425be1b84",
    "q4_k_s": "5349a6c8eb9fece4cfaf4ffabd77c9a214aae236d89eaac75a3f3f8ff86e9032",
    "q4_k_m": "562c4193f88fcae7f2296e63e86abae8da3fb118b6100cbfc4668558a6b0c204",
    "q5_k_s": "92e3229922cf59b5a1741579fcd63a27022890c34ded2f0009718d195d378016",
    "q5_k_m": "896eeae60dbe20081f99a90edbbe0801cb806b76eb5fc9d9d2093d158c9d3a97",
    "q6_k": "44cb76ae9b7271d2a0af2c2fa39ef8daec6670912adf95e80a5d476e390bb59f",
    "iq4_nl": "1529002c8ac4e7dc7d0a583af8b5b3bd74f963014d2305b309cc7994ed279d31",
    "iq4_xs": "41fecdf92689fd5dd3a889e01c92cd7a87f86c330b7c362846abdfc55244bb2e",
}
FROZEN_WEIGHTED = {
    "q4_0": "c28b22f36a12d4284ed361af8cc49dc6ec2a35395f36cace6ce12cfc1624c649",
    "q4_1": "9ef6592ea441e76c75ead02c03e575b63991a498ca0b81df35eed8035d6f0701",
    "q5_0": "ea9b4e200fbf5b627b95a4d5de6cb9bb592f72cd8a958cb15a9355495bdaee53",
    "q5_1": "249e6cbe4b267218f40c40184038a9b100a32c17b315595853fce250787ca61a",
    "q4_k_s": "7d54b0a393054b08733dafe2a9c7fac8a93e1b99bc132c2dd0c515b69d385c2b",
    "q4_k_m": "52d006347bc2cb70c27af73b9533284d9d445e815fa6d5e79106d1e79d5cc6a4",
    "q5_k_s": "83857788f7940f519dfc476abcd464b946424fd2754aeec73e2f67dfc4f0b17f",
    "q5_k_m": "273a5361c2f0e68fa27f7c5f2bd4eaf5dc2e6d46ff50337dbb53b74cbdae5405",
    "q6_k": "c50a6addb793ec4cd0c0e35b5e2d3df4e535cbae70929dafd149f65a8819c482",
    "iq4_nl": "e096ebcdf7a5aab027c3341fad6b9809fb7bd728df5418da8baad83bb84b8ada",
    "iq4_xs": "52f2cb92f73b5b082fd83799f750f8e8fc8fe752c017e60067cddf8c6a7dbd07",
}


@pytest.mark.parametrize("recipe", FROZEN)
def test_tiny_llama_has_the_bytes_of_llama_quantize(tiny_llama: Path, tmp_path: Path, recipe: str) -> None:
    llamatools.quantize(tiny_llama, tmp_path / "q.gguf", recipe)
    assert digest(tmp_path / "q.gguf") == FROZEN[recipe]


@pytest.mark.parametrize("recipe", FROZEN_WEIGHTED)
def test_tiny_llama_has_the_bytes_of_llama_quantize_with_an_imatrix(
    tiny_llama: Path, tmp_path: Path, recipe: str
) -> None:
    imatrix = write_imatrix(tmp_path / "i.dat", columns_of(tiny_llama))
    done = llamatools.quantize(tiny_llama, tmp_path / "q.gguf", recipe, options=QuantizeOptions(imatrix=imatrix))
    assert digest(tmp_path / "q.gguf") == FROZEN_WEIGHTED[recipe]
    assert "imatrix   has no entry for token_embd.weight, output.weight" in reports.lines(done)


def test_report_against_gguf_py(source: Path, tmp_path: Path) -> None:
    done = llamatools.quantize(source, tmp_path / "q.gguf", "q4_k_m")
    facts = {tensor["name"]: tensor for tensor in reports.as_json(done)["tensors"]}
    originals, squares, errors = tensors_of(source), 0.0, 0.0
    for name, tensor in tensors_of(tmp_path / "q.gguf").items():
        fact = facts[name]
        assert fact["nbytes"] == tensor.n_bytes
        if len(tensor.shape) == 1:
            assert fact["relative_rmse"] is None
            continue
        original = floats(originals[name]).astype(np.float64)
        difference = floats(tensor) - original
        squares, errors = squares + np.sum(original**2), errors + np.sum(difference**2)
        rms = np.sqrt(np.mean(original**2))
        assert fact["relative_rmse"] == pytest.approx(np.sqrt(np.mean(difference**2)) / rms, rel=1e-5)
        assert fact["bits_per_weight"] == 8 * tensor.n_bytes / tensor.n_elements
        size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][0]
        by_block = np.sqrt(np.mean(difference.reshape(-1, size) ** 2, axis=1)) / rms
        assert fact["worst_block"]["error"] == pytest.approx(by_block.max(), rel=1e-5)
        at = fact["worst_block"]["row"] * original.shape[1] + fact["worst_block"]["column"]
        assert at == by_block.argmax() * size
    total = reports.as_json(done)["total"]
    assert total["relative_rmse"] == pytest.approx(np.sqrt(errors / squares), rel=1e-5)
    assert total["nbytes"] == sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors)
    assert all(len(line) <= 80 for line in reports.table(done.changes).lines())


def test_rows_that_do_not_divide_fall_back_or_are_an_error(source: Path, tmp_path: Path) -> None:
    done = llamatools.quantize(source, tmp_path / "q.gguf", "q4_k_s")
    fallbacks = [line for line in reports.lines(done) if line.startswith("fallback")]
    assert fallbacks == [
        f"fallback  blk.{n}.ffn_down.weight: Q5_0, since rows of 288 weights do not divide into Q4_K blocks of 256"
        for n in range(2)
    ]
    with pytest.raises(UsageError, match="rows of 288 weights do not divide into Q4_K blocks of 256"):
        llamatools.quantize(source, tmp_path / "s.gguf", "q4_k_s", options=QuantizeOptions(strict=True))


def test_rules_of_a_file_that_decide_nothing_are_told_or_an_error(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.recipe"
    recipe.write_text("attn_w = Q6_K\nattn_v = Q8_0\n. = Q4_0\nffn = Q5_0\n")
    options = QuantizeOptions(tensor_types=["attn_v=Q6_K"])  # decides what a rule of the file would
    done = llamatools.quantize(source, tmp_path / "q.gguf", recipe, options=options)
    assert [line for line in reports.lines(done) if line.startswith("idle")] == [
        "idle      rule 'attn_w = Q6_K' of mine.recipe decides no tensor",
        "idle      rule 'ffn = Q5_0' of mine.recipe decides no tensor",
    ]
    report = reports.as_json(done)
    assert report["recipe"] == ["attn_v = Q6_K", "attn_w = Q6_K", "attn_v = Q8_0", ". = Q4_0", "ffn = Q5_0"]
    assert report["idle_rules"] == ["attn_w = Q6_K", "ffn = Q5_0"]
    with pytest.raises(UsageError, match=r"rule 'attn_w = Q6_K' of mine.recipe: decides no tensor of this model. Take"):
        llamatools.quantize(source, tmp_path / "s.gguf", recipe, options=QuantizeOptions(strict=True))
    named = llamatools.quantize(source, tmp_path / "n.gguf", "q4_0", options=QuantizeOptions(strict=True))
    assert reports.as_json(named)["idle_rules"] == []


@pytest.mark.parametrize("rows_at_once", [1, 3, 7, 100])
def test_experts_have_importances_of_their_own(rows_at_once: int) -> None:
    draws = np.random.default_rng(5)
    values = draws.standard_normal((3, 5, 256)).astype(np.float32)
    importance = draws.random((3, 256), np.float32)
    cast = Cast(ArrayTensor("experts", F32, values), named("Q4_K"), importance.ravel())
    pieces = [cast.read(start, min(start + rows_at_once, 15)) for start in range(0, 15, rows_at_once)]
    expected = [llamacpp.quantize(12, values[n], importance[n]) for n in range(3)]
    assert np.concatenate(pieces).tobytes() == np.concatenate(expected).tobytes()


def test_search_needs_an_imatrix(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--rounding search: less error in the weights .* Name one with --imatrix"):
        llamatools.quantize(source, tmp_path / "q.gguf", "q4_0", options=QuantizeOptions(rounding="search"))
    with pytest.raises(UsageError, match="--rounding: unknown rounding 'best'. It is exact or search"):
        llamatools.quantize(source, tmp_path / "q.gguf", "q4_0", options=QuantizeOptions(rounding="best"))


def test_search_changes_the_weighted_tensors_only(source: Path, tmp_path: Path) -> None:
    imatrix = write_imatrix(tmp_path / "i.dat", columns_of(source))
    files = []
    for rounding in ("exact", "search"):
        options = QuantizeOptions(imatrix=imatrix, rounding=rounding)
        llamatools.quantize(source, tmp_path / f"{rounding}.gguf", "q4_0", options=options)
        files.append(tensors_of(tmp_path / f"{rounding}.gguf"))
    differing = {name for name in files[0] if files[0][name].data.tobytes() != files[1][name].data.tobytes()}
    searchable = {name for name, tensor in files[0].items() if named(tensor.tensor_type.name).search}
    assert differing == searchable & {*columns_of(source), "output.weight"}  # whose importance search derives


def test_an_imatrix_of_another_model(source: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(imatrix=write_imatrix(tmp_path / "i.dat", {"blk.0.attn_q.weight": 128}))
    message = r"i.dat: tensor 'blk.0.attn_q.weight': it has 128 columns here and 256 in the model. This imatrix is"
    with pytest.raises(FormatError, match=message):
        llamatools.quantize(source, tmp_path / "q.gguf", "q4_0", options=options)
    options = QuantizeOptions(imatrix=write_imatrix(tmp_path / "j.dat", {"model.layers.0": 128}))
    with pytest.raises(FormatError, match="j.dat: none of its 1 entries is for a tensor of the model. This imatrix is"):
        llamatools.quantize(source, tmp_path / "q.gguf", "q4_0", options=options)
    columns = columns_of(source) | {"token_embd.weight": 7}  # is passed over, as in llama.cpp
    options = QuantizeOptions(imatrix=write_imatrix(tmp_path / "k.dat", columns))
    done = llamatools.quantize(source, tmp_path / "q.gguf", "q4_0", options=options)
    assert [change.name for change in done.changes if change.weighted is False] == [
        "token_embd.weight",
        "output.weight",
    ]
    fields = gguf.GGUFReader(tmp_path / "q.gguf").fields
    keys = {key: fields[f"quantize.imatrix.{key}"].contents() for key in ("file", "dataset", "entries_count")}
    assert keys == {"file": "k.dat", "dataset": "text", "entries_count": 15}
    assert fields["quantize.imatrix.chunks_count"].contents() == 8


def test_sources_that_cannot_be_quantized(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:-5000])
    with pytest.raises(FormatError, match=r"cut.gguf: tensor .* The file is probably truncated"):
        llamatools.quantize(tmp_path / "cut.gguf", tmp_path / "q.gguf", "q4_0")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(FormatError, match="text.gguf: no model file: it begins with b'hello'"):
        llamatools.quantize(tmp_path / "text.gguf", tmp_path / "q.gguf", "q4_0")
    with pytest.raises(UnsupportedError, match="tiny-llama: no GGUF file, but Meta checkpoint. Convert it first, or"):
        llamatools.quantize(FIXTURE, tmp_path / "q.gguf", "q4_0")
    with pytest.raises(UsageError, match="is both source and destination"):
        llamatools.quantize(source, source, "q4_0", force=True)
    recipe, imatrix = tmp_path / "recipe", write_imatrix(tmp_path / "i.dat", columns_of(source))
    recipe.write_text(". = Q8_0\n")
    for read in (recipe, imatrix):
        with pytest.raises(UsageError, match=f"{read.name}: is both source and destination"):
            llamatools.quantize(source, read, recipe, force=True, options=QuantizeOptions(imatrix=imatrix))
    with pytest.raises(UsageError, match="--threads: 0 threads cannot do the work"):
        llamatools.quantize(source, tmp_path / "q.gguf", "q4_0", threads=0)
    with pytest.raises(UsageError, match="--dtype: f16 is no recipe, which the other options need"):
        llamatools.convert(FIXTURE, tmp_path / "q.gguf", dtype="f16", quantizing=QuantizeOptions(pure=True))
    assert not (tmp_path / "q.gguf").exists()


def test_the_rules_for_a_checkpoint_are_those_for_its_gguf(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = MetaOptions(overrides=Overrides(context=1024))
    asked = QuantizeOptions(tensor_types=["ffn_up=q8_0"], embedding_type="q6_k")
    rules = llamatools.recipe_of(FIXTURE, "q4_k_m", options=asked, checkpoint_options=checkpoint)
    assert rules == llamatools.recipe_of(tiny_llama, "q4_k_m", options=asked)
    (tmp_path / "recipe").write_text(rules.text())
    for recipe, options in (("q4_k_m", asked), (tmp_path / "recipe", QuantizeOptions())):
        done = llamatools.convert(
            FIXTURE, tmp_path / "q.gguf", dtype=recipe, quantizing=options, options=checkpoint, force=True
        )
        assert done.recipe == rules
    groups_of_4 = {"llama.attention.head_count_kv": "1"}  # for which iq4_nl has other rules
    changed = llamatools.recipe_of(FIXTURE, "iq4_nl", checkpoint_options=checkpoint, settings=groups_of_4)
    assert changed != llamatools.recipe_of(FIXTURE, "iq4_nl", checkpoint_options=checkpoint)


def test_a_report_replaces_an_earlier_report_only(source: Path, tmp_path: Path) -> None:
    report, model = tmp_path / "r.json", tmp_path / "q.gguf"
    for recipe in ("q8_0", "q4_0"):
        done = llamatools.quantize(source, model, recipe, force=True)
        reports.check_report(report, model)
        reports.write_report(done, report)
        assert json.loads(report.read_text()) == reports.as_json(done)
    before = model.read_bytes()
    for write in (lambda path: reports.check_report(path, source), lambda path: reports.write_report(done, path)):
        (tmp_path / "text").write_text("{}\n")
        with pytest.raises(UsageError, match="text: is there already and is no report of an earlier run. Name another"):
            write(tmp_path / "text")
    for path in (model, tmp_path / "." / "q.gguf"):
        with pytest.raises(UsageError, match="q.gguf: is both the model and its report. Name another file"):
            reports.check_report(path, model)
    assert model.read_bytes() == before


def run(*arguments: object, **how: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llamatools", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **how)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["q4_q_m"], 2, "'q4_q_m' is neither a named recipe nor a file. Did you mean q4_k_m"),
        (["q4_0", "--tensor-type", "ffn=q4_9"], 2, "--tensor-type ffn=q4_9: unknown dtype 'q4_9'. Did you mean"),
        (
            ["q4_0", "--tensor-type", "ffn=iq2_xs"],
            5,
            "ffn=iq2_xs: llamatools cannot write IQ2_XS weights",
        ),
        (["q4_0", "--tensor-type", "nowhere=q8_0"], 2, "no tensor's name matches it"),
        (["q4_0", "--output-type", "q9"], 2, "--output-type: unknown dtype 'q9'"),
        (["q4_0", "--align", "48"], 2, "48 is no power of two from 32 to 2097152"),
        (["q4_0", "--align", "0"], 2, "0 is no power of two from 32 to 2097152"),
        (["q4_0", "--report", "/nowhere/report.json"], 2, "/nowhere/report.json: its folder does not exist"),
    ],
)
def test_requests_that_cannot_be_met(source: Path, tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    before = source.read_bytes()
    done = run("quantize", source, tmp_path / "q.gguf", *arguments)
    assert done.returncode == code
    assert said in done.stderr.splitlines()[-1]
    assert len([line for line in done.stderr.splitlines() if "compiling" not in line]) == 1
    assert os.listdir(tmp_path) == []
    assert source.read_bytes() == before


def test_command_line(source: Path, tmp_path: Path) -> None:
    printed = run("quantize", source, tmp_path / "q.gguf", "q4_k_s", "--print-recipe")
    assert not (tmp_path / "q.gguf").exists()
    (tmp_path / "recipe").write_text(printed.stdout)
    done = run(
        "quantize", source, tmp_path / "q.gguf", tmp_path / "recipe", "--report", tmp_path / "report.json", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(done.stdout)["quantized"] == report
    llamatools.quantize(source, tmp_path / "named.gguf", "q4_k_s")
    assert digest(tmp_path / "named.gguf") == digest(tmp_path / "q.gguf")
    shown = run("quantize", source, tmp_path / "r.gguf", "q4_k_s", "--threads", "1")
    assert shown.stdout.splitlines()[0].split() == ["tensors", "dtype", "size", "error", "worst", "block"]
    assert (tmp_path / "r.gguf").read_bytes() == (tmp_path / "named.gguf").read_bytes()


def test_the_recipe_of_one_pass_is_printed(tiny_llama: Path, tmp_path: Path) -> None:
    asked = ("--tensor-type", "ffn_up=q8_0", "--pure")
    printed = run("convert", FIXTURE, tmp_path / "q.gguf", "--dtype", "Q4_0", *asked, "--context", 64, "--print-recipe")
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == run("quantize", tiny_llama, "x", "Q4_0", *asked, "--print-recipe").stdout
    assert os.listdir(tmp_path) == []
    (tmp_path / "recipe").write_text(printed.stdout)
    named, file = tmp_path / "named.gguf", tmp_path / "file.gguf"
    for path, recipe, how in ((named, "Q4_0", asked), (file, tmp_path / "recipe", ["--strict"])):
        done = run("convert", FIXTURE, path, "--dtype", recipe, *how, "--context", 64)
        assert done.returncode == 0, done.stderr
    assert digest(named) == digest(file)


@pytest.mark.parametrize("option", [["--report", "r.json"], ["--print-recipe"]])
@pytest.mark.parametrize("dtype", ["auto", "F16"])
def test_without_a_recipe_there_is_nothing_to_report(tmp_path: Path, dtype: str, option: list[str]) -> None:
    done = run("convert", FIXTURE, "q.gguf", "--dtype", dtype, "--context", 64, *option, cwd=tmp_path)
    assert done.returncode == 2
    said = f"{option[0]}: {dtype.lower()} is no recipe, which it needs. Name one with --dtype\n"
    assert done.stderr == said
    assert os.listdir(tmp_path) == []


def test_a_report_never_replaces_a_model(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    for report, said in ((source, "is there already and is no report"), (tmp_path / "q.gguf", "is both the model and")):
        done = run("quantize", source, tmp_path / "q.gguf", "q4_0", "--report", report, "--force")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert said in done.stderr
    assert os.listdir(tmp_path) == []
    assert source.read_bytes() == before


def test_a_damaged_source_is_refused_when_asked(source: Path, tmp_path: Path) -> None:
    llamatools.convert(source, tmp_path / "whole.gguf")
    sound = run("quantize", tmp_path / "whole.gguf", tmp_path / "q.gguf", "q8_0", "--verify-source")
    assert sound.returncode == 0
    assert "verified  21 of 21 tensors: SHA-256 as stored" in sound.stderr.splitlines()
    path = damaged(tmp_path / "whole.gguf", tmp_path / "damaged.gguf", "blk.0.attn_q.weight")
    done = run("quantize", path, tmp_path / "no.gguf", "q8_0", "--verify-source")
    assert done.returncode == 3
    assert "damaged.gguf: tensor 'blk.0.attn_q.weight': its bytes have the SHA-256" in done.stderr
    assert not (tmp_path / "no.gguf").exists()


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path) -> None:
    done = run(
        "quantize", source, tmp_path / "q.gguf", "q4_0",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )  # fmt: skip
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1] == f"{tmp_path / 'q.gguf'}: file too large"
    assert os.listdir(tmp_path) == []


SLOW = """
import time
from llamatools import tensors
read = tensors.FileTensor.read
def slow(*args):
    time.sleep(0.2)
    return read(*args)
tensors.FileTensor.read = slow
from llamatools.cli import main
main()
"""


def test_an_interruption_leaves_nothing(source: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "quantize", str(source), str(tmp_path / "q.gguf"), "q4_0", "--threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not os.listdir(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; nothing was left behind"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("recipe", FROZEN)
def test_llama_cpp_loads_and_says_what_run_says(tiny_llama: Path, tmp_path: Path, recipe: str) -> None:
    import llamatools_runtime as runtime

    llamatools.quantize(tiny_llama, tmp_path / "q.gguf", recipe)
    ours = runtime.run(tmp_path / "q.gguf", "", max_tokens=64)
    with llamacpp.Model(tmp_path / "q.gguf") as model:
        assert list(ours.ids) == model.greedy([model.bos_id], 64)
