"""Quantizing whole files: each tensor against ggml's C, the rest against gguf-py."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import gguf
import gguf_files
import llamacpp
import numpy as np
import pytest
import torch
from imatrix_files import write_imatrix
from meta_checkpoints import params_of, write_meta
from quantizing import TINY_LLAMA, WIDE, columns_of, damaged, digest, floats, tensors_of, write_wide
from tiny_llamas import Weights

import llamatools
from llamatools import MetaOptions, Overrides, QuantizeOptions, reports
from llamatools.dtypes import F32, named
from llamatools.errors import FormatError, UnsupportedError, UsageError
from llamatools.provenance import recorded_digests
from llamatools.tensors import ArrayTensor, Cast

OPTIONS = MetaOptions(overrides=Overrides(context=64))


@pytest.mark.parametrize("recipe", ["q4_0", "q4_k_m", "iq4_xs"])
def test_every_tensor_has_the_bytes_of_ggml(wide_gguf: Path, tmp_path: Path, recipe: str) -> None:
    done = llamatools.quantize(wide_gguf, tmp_path / "q.gguf", recipe)
    originals = tensors_of(wide_gguf)
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
    wide_weights: Weights, tmp_path: Path, sentencepiece_model: bytes, recipe: str, alignment: int
) -> None:
    state = {name: torch.from_numpy(array) for name, array in wide_weights.items()}
    meta = write_meta(tmp_path / "m", state, params_of(WIDE), sentencepiece_model, n_shards=2, dtype=torch.bfloat16)
    llamatools.convert(meta, tmp_path / "auto.gguf", options=OPTIONS, alignment=alignment)
    llamatools.quantize(tmp_path / "auto.gguf", tmp_path / "two.gguf", recipe)
    llamatools.convert(meta, tmp_path / "one.gguf", options=OPTIONS, alignment=alignment, dtype=recipe)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


@pytest.mark.parametrize("asked", [None, 32, 64, 1 << 21])
def test_alignment_is_kept_or_changed(wide_gguf: Path, tmp_path: Path, asked: int | None) -> None:
    aligned = tmp_path / "aligned.gguf"
    llamatools.quantize(wide_gguf, aligned, "q8_0", alignment=4096)
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


def test_metadata_is_carried_over(wide_weights: Weights, tmp_path: Path) -> None:
    extra = {"general.file_type": 32, "general.name": "A name", "x.y": [1, 2]}
    source = write_wide(tmp_path / "s.gguf", wide_weights, extra=extra)
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


def test_a_source_is_held_against_the_digests_inside(wide_gguf: Path, tmp_path: Path) -> None:
    whole, destination = tmp_path / "whole.gguf", tmp_path / "q.gguf"
    with pytest.raises(UsageError, match=r"wide.gguf: --verify-source: no digests of its weights are stored in it"):
        llamatools.quantize(wide_gguf, destination, "q4_0", verify=True)
    llamatools.convert(wide_gguf, whole)
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


def test_a_set_of_files_becomes_one(wide_weights: Weights, wide_gguf: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "set.gguf", "llama", split_max_tensors=7)
    for key, field in gguf.GGUFReader(wide_gguf).fields.items():
        if not key.startswith(("GGUF", "general.arch")):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for tensor in gguf.GGUFReader(wide_gguf).tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(tmp_path.iterdir())
    assert len(shards) == 3
    llamatools.quantize(shards[1], tmp_path / "q.gguf", "q4_0")
    llamatools.quantize(wide_gguf, tmp_path / "whole.gguf", "q4_0")
    assert digest(tmp_path / "q.gguf") == digest(tmp_path / "whole.gguf")
    fields = gguf.GGUFReader(tmp_path / "q.gguf").fields
    assert not any(key.startswith("split.") for key in fields)
    assert fields["llamatools.source.files"].contents() == [path.name for path in shards]


def test_digests(wide_gguf: Path, tmp_path: Path) -> None:
    llamatools.quantize(wide_gguf, tmp_path / "q.gguf", "q4_k_s")
    recorded = recorded_digests(llamatools.inspect(tmp_path / "q.gguf").metadata)
    for name, tensor in tensors_of(tmp_path / "q.gguf").items():
        assert recorded[name].sha256 == hashlib.sha256(tensor.data.tobytes()).hexdigest()


def test_same_bytes_for_any_number_of_threads(wide_gguf: Path, tmp_path: Path) -> None:
    for threads in (1, 2, 7):
        llamatools.quantize(wide_gguf, tmp_path / f"{threads}.gguf", "q4_k_m", threads=threads)
    assert len({(tmp_path / f"{threads}.gguf").read_bytes() for threads in (1, 2, 7)}) == 1


def test_dry_run_plans_the_very_file(wide_gguf: Path, tmp_path: Path) -> None:
    planned = llamatools.quantize(wide_gguf, tmp_path / "q.gguf", "q4_k_m", dry_run=True)
    assert not (tmp_path / "q.gguf").exists()
    llamatools.quantize(wide_gguf, tmp_path / "q.gguf", "q4_k_m")
    assert planned.layout.size == (tmp_path / "q.gguf").stat().st_size
    tensors = gguf.GGUFReader(tmp_path / "q.gguf").tensors
    assert [(t.name, t.offset) for t in planned.layout.tensors] == [(t.name, t.data_offset) for t in tensors]


@pytest.mark.parametrize(("value", "said"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize(
    ("tensor", "place"), [("layers.1.feed_forward.w1.weight", (287, 255)), ("norm.weight", (0, 7))]
)
def test_what_is_no_number_is_refused(
    wide_weights: Weights, tmp_path: Path, value: float, said: str, tensor: str, place: tuple[int, int]
) -> None:
    damaged = {name: array.copy() for name, array in wide_weights.items()}
    damaged[tensor].reshape(-1, 256)[place] = value
    source = write_wide(tmp_path / "s.gguf", damaged)
    with pytest.raises(FormatError, match=f"row {place[0]}, column {place[1]} is {said}, which is no number. The file"):
        llamatools.quantize(source, tmp_path / "q.gguf", "q4_0")
    assert os.listdir(tmp_path) == ["s.gguf"]


def test_weights_too_large_for_a_block_are_refused(wide_weights: Weights, tmp_path: Path) -> None:
    large = {name: array.copy() for name, array in wide_weights.items()}
    large["output.weight"][3, 40] = 3e9
    source = write_wide(tmp_path / "s.gguf", large)
    with pytest.raises(FormatError, match=r"row 3, column \d+, .*too large for Q4_0, whose scales end at 65504"):
        llamatools.quantize(source, tmp_path / "q.gguf", "q4_0", options=QuantizeOptions(pure=True))
    options = QuantizeOptions(output_type="bf16")
    llamatools.quantize(source, tmp_path / "q.gguf", "q4_0", options=options)


def test_quantized_weights_are_quantized_again_only_when_asked(wide_gguf: Path, tmp_path: Path) -> None:
    llamatools.quantize(wide_gguf, tmp_path / "q8.gguf", "q8_0")
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


def test_report_against_gguf_py(wide_gguf: Path, tmp_path: Path) -> None:
    done = llamatools.quantize(wide_gguf, tmp_path / "q.gguf", "q4_k_m")
    facts = {tensor["name"]: tensor for tensor in reports.as_json(done)["tensors"]}
    originals, squares, errors = tensors_of(wide_gguf), 0.0, 0.0
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


def test_rows_that_do_not_divide_fall_back_or_are_an_error(wide_gguf: Path, tmp_path: Path) -> None:
    done = llamatools.quantize(wide_gguf, tmp_path / "q.gguf", "q4_k_s")
    fallbacks = [line for line in reports.lines(done) if line.startswith("fallback")]
    assert fallbacks == [
        f"fallback  blk.{n}.ffn_down.weight: Q5_0, since rows of 288 weights do not divide into Q4_K blocks of 256"
        for n in range(2)
    ]
    with pytest.raises(UsageError, match="rows of 288 weights do not divide into Q4_K blocks of 256"):
        llamatools.quantize(wide_gguf, tmp_path / "s.gguf", "q4_k_s", options=QuantizeOptions(strict=True))


def test_rules_of_a_file_that_decide_nothing_are_told_or_an_error(wide_gguf: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.recipe"
    recipe.write_text("attn_w = Q6_K\nattn_v = Q8_0\n. = Q4_0\nffn = Q5_0\n")
    options = QuantizeOptions(tensor_types=["attn_v=Q6_K"])  # decides what a rule of the file would
    done = llamatools.quantize(wide_gguf, tmp_path / "q.gguf", recipe, options=options)
    assert [line for line in reports.lines(done) if line.startswith("idle")] == [
        "idle      rule 'attn_w = Q6_K' of mine.recipe decides no tensor",
        "idle      rule 'ffn = Q5_0' of mine.recipe decides no tensor",
    ]
    report = reports.as_json(done)
    assert report["recipe"] == ["attn_v = Q6_K", "attn_w = Q6_K", "attn_v = Q8_0", ". = Q4_0", "ffn = Q5_0"]
    assert report["idle_rules"] == ["attn_w = Q6_K", "ffn = Q5_0"]
    with pytest.raises(UsageError, match=r"rule 'attn_w = Q6_K' of mine.recipe: decides no tensor of this model. Take"):
        llamatools.quantize(wide_gguf, tmp_path / "s.gguf", recipe, options=QuantizeOptions(strict=True))
    named = llamatools.quantize(wide_gguf, tmp_path / "n.gguf", "q4_0", options=QuantizeOptions(strict=True))
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


def test_search_needs_an_imatrix(wide_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--rounding search: less error in the weights .* Name one with --imatrix"):
        llamatools.quantize(wide_gguf, tmp_path / "q.gguf", "q4_0", options=QuantizeOptions(rounding="search"))
    with pytest.raises(UsageError, match="--rounding: unknown rounding 'best'. It is exact or search"):
        llamatools.quantize(wide_gguf, tmp_path / "q.gguf", "q4_0", options=QuantizeOptions(rounding="best"))


def test_search_changes_the_weighted_tensors_only(wide_gguf: Path, tmp_path: Path) -> None:
    imatrix = write_imatrix(tmp_path / "i.dat", columns_of(wide_gguf))
    files = []
    for rounding in ("exact", "search"):
        options = QuantizeOptions(imatrix=imatrix, rounding=rounding)
        llamatools.quantize(wide_gguf, tmp_path / f"{rounding}.gguf", "q4_0", options=options)
        files.append(tensors_of(tmp_path / f"{rounding}.gguf"))
    differing = {name for name in files[0] if files[0][name].data.tobytes() != files[1][name].data.tobytes()}
    searchable = {name for name, tensor in files[0].items() if named(tensor.tensor_type.name).search}
    assert differing == searchable & {*columns_of(wide_gguf), "output.weight"}  # whose importance search derives


def test_an_imatrix_of_another_model(wide_gguf: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(imatrix=write_imatrix(tmp_path / "i.dat", {"blk.0.attn_q.weight": 128}))
    message = r"i.dat: tensor 'blk.0.attn_q.weight': it has 128 columns here and 256 in the model. This imatrix is"
    with pytest.raises(FormatError, match=message):
        llamatools.quantize(wide_gguf, tmp_path / "q.gguf", "q4_0", options=options)
    options = QuantizeOptions(imatrix=write_imatrix(tmp_path / "j.dat", {"model.layers.0": 128}))
    with pytest.raises(FormatError, match="j.dat: none of its 1 entries is for a tensor of the model. This imatrix is"):
        llamatools.quantize(wide_gguf, tmp_path / "q.gguf", "q4_0", options=options)
    columns = columns_of(wide_gguf) | {"token_embd.weight": 7}  # is passed over, as in llama.cpp
    options = QuantizeOptions(imatrix=write_imatrix(tmp_path / "k.dat", columns))
    done = llamatools.quantize(wide_gguf, tmp_path / "q.gguf", "q4_0", options=options)
    assert [change.name for change in done.changes if change.weighted is False] == [
        "token_embd.weight",
        "output.weight",
    ]
    fields = gguf.GGUFReader(tmp_path / "q.gguf").fields
    keys = {key: fields[f"quantize.imatrix.{key}"].contents() for key in ("file", "dataset", "entries_count")}
    assert keys == {"file": "k.dat", "dataset": "text", "entries_count": 15}
    assert fields["quantize.imatrix.chunks_count"].contents() == 8


def test_sources_that_cannot_be_quantized(wide_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(wide_gguf.read_bytes()[:-5000])
    with pytest.raises(FormatError, match=r"cut.gguf: tensor .* The file is probably truncated"):
        llamatools.quantize(tmp_path / "cut.gguf", tmp_path / "q.gguf", "q4_0")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(FormatError, match="text.gguf: no model file: it begins with b'hello'"):
        llamatools.quantize(tmp_path / "text.gguf", tmp_path / "q.gguf", "q4_0")
    with pytest.raises(UnsupportedError, match="tiny-llama: no GGUF file, but Meta checkpoint. Convert it first, or"):
        llamatools.quantize(TINY_LLAMA, tmp_path / "q.gguf", "q4_0")
    with pytest.raises(UsageError, match="is both source and destination"):
        llamatools.quantize(wide_gguf, wide_gguf, "q4_0", force=True)
    recipe, imatrix = tmp_path / "recipe", write_imatrix(tmp_path / "i.dat", columns_of(wide_gguf))
    recipe.write_text(". = Q8_0\n")
    for read in (recipe, imatrix):
        with pytest.raises(UsageError, match=f"{read.name}: is both source and destination"):
            llamatools.quantize(wide_gguf, read, recipe, force=True, options=QuantizeOptions(imatrix=imatrix))
    with pytest.raises(UsageError, match="--threads: 0 threads cannot do the work"):
        llamatools.quantize(wide_gguf, tmp_path / "q.gguf", "q4_0", threads=0)
    with pytest.raises(UsageError, match="--dtype: f16 is no recipe, which the other options need"):
        llamatools.convert(TINY_LLAMA, tmp_path / "q.gguf", dtype="f16", quantizing=QuantizeOptions(pure=True))
    assert not (tmp_path / "q.gguf").exists()


def test_a_report_replaces_an_earlier_report_only(wide_gguf: Path, tmp_path: Path) -> None:
    report, model = tmp_path / "r.json", tmp_path / "q.gguf"
    for recipe in ("q8_0", "q4_0"):
        done = llamatools.quantize(wide_gguf, model, recipe, force=True)
        reports.check_report(report, model)
        reports.write_report(done, report)
        assert json.loads(report.read_text()) == reports.as_json(done)
    before = model.read_bytes()
    for write in (lambda path: reports.check_report(path, wide_gguf), lambda path: reports.write_report(done, path)):
        (tmp_path / "text").write_text("{}\n")
        with pytest.raises(UsageError, match="text: is there already and is no report of an earlier run. Name another"):
            write(tmp_path / "text")
    for path in (model, tmp_path / "." / "q.gguf"):
        with pytest.raises(UsageError, match="q.gguf: is both the model and its report. Name another file"):
            reports.check_report(path, model)
    assert model.read_bytes() == before
