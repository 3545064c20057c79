"""`inspect --diff`: any two formats side by side; what differs, and how far, by numpy."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from meta_checkpoints import tied, write_meta
from same_models import OPTIONS, K, Q, data_of, params, state_of, write_hf
from tiny_llamas import TINY, hf_rows, random_weights, write_gguf

import llamatools

Q8_0, BF16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16
GATE = "blk.0.ffn_gate.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes) -> Path:
    folder = tmp_path_factory.mktemp("m")
    write_meta(folder / "meta", state_of(), params(), sentencepiece_model, n_shards=2)
    llamatools.convert(folder / "meta", folder / "m.gguf", options=OPTIONS)
    write_hf(folder / "hf", state_of())
    return folder


def verdicts(found: llamatools.Difference) -> dict[str, int]:
    listed = [tensor.verdict for tensor in found.tensors]
    return {verdict: listed.count(verdict) for verdict in dict.fromkeys(listed)}


def test_one_model_in_three_formats(folder: Path) -> None:
    found = llamatools.diff(folder / "m.gguf", folder / "meta", options=OPTIONS)
    assert (found.same, verdicts(found)) == (True, {"same bytes": 30})
    for a, b in (("m.gguf", "hf"), ("hf", "m.gguf"), ("hf", "hf")):
        found = llamatools.diff(folder / a, folder / b)
        of = {tensor.name: tensor for tensor in found.tensors}
        if a == b:
            assert verdicts(found) == {"same bytes": 30}
        else:
            assert verdicts(found) == {"same values": 6, "same bytes": 24}
            assert of[Q].how == "F32, rows in Meta's and in Hugging Face's order"
        assert (found.same, found.fields) == (True, ())
    assert found.not_compared == (
        f"tokenizer: {folder / 'hf'} and {folder / 'hf'} have none",
        "other metadata: each format has keys of its own",
    )


def test_other_dtypes_and_ties(folder: Path, tmp_path: Path, sentencepiece_model: bytes) -> None:
    source = write_meta(tmp_path / "m", tied(state_of()), params(), sentencepiece_model, dtype=torch.bfloat16)
    llamatools.convert(source, tmp_path / "m.gguf", dtype="f32", options=OPTIONS)
    found = llamatools.diff(source, tmp_path / "m.gguf", options=OPTIONS)
    assert (found.same, verdicts(found)) == (True, {"same values": 30})
    how = {tensor.name: tensor.how for tensor in found.tensors}
    assert how[Q] == "BF16 and F32"
    assert how["output.weight"] == "BF16 300x64, equal to the embedding; only in A"


def test_the_worst_tensor_comes_first(folder: Path, tmp_path: Path) -> None:
    weights = random_weights(TINY)
    worse = dict(weights)
    for name, much in (("layers.0.feed_forward.w1.weight", 0.5), ("layers.1.feed_forward.w2.weight", 0.1)):
        worse[name] = weights[name] + np.float32(much) * np.roll(weights[name], 1)
    worse["layers.2.attention.wv.weight"] = worse["layers.2.attention.wv.weight"][:, :32]
    worse["layers.1.attention.wk.weight"] = worse["layers.1.attention.wk.weight"][hf_rows(4, 8)]
    del worse["norm.weight"]
    path = write_gguf(tmp_path / "m.gguf", worse, TINY, more_tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    found = llamatools.diff(folder / "m.gguf", path)
    wk = weights["layers.1.attention.wk.weight"].astype(np.float64)
    expected = [
        ("blk.2.attn_v.weight", "different", "shape 32x64 and 32x32", None),
        ("output_norm.weight", "only in A", "F32 64", None),
        ("rope_freqs.weight", "only in B", "F32 4", None),
        (K, "different", "F32, but the rows of B are in Hugging Face's order, where Meta's is due",
         np.sqrt(np.square(wk[hf_rows(4, 8)] - wk).sum() / np.square(wk).sum())),
    ]  # fmt: skip
    changed = {GATE: "layers.0.feed_forward.w1.weight", "blk.1.ffn_down.weight": "layers.1.feed_forward.w2.weight"}
    for name, meta in changed.items():
        a, b = (of[meta].astype(np.float64) for of in (weights, worse))
        expected.append((name, "different", "F32", np.sqrt(np.square(b - a).sum() / np.square(a).sum())))
    assert not found.same
    assert verdicts(found)["same bytes"] == 25
    for tensor, (name, verdict, how, error) in zip(found.tensors, expected, strict=False):
        assert (tensor.name, tensor.verdict, tensor.how) == (name, verdict, how)
        assert tensor.error == (None if error is None else pytest.approx(error, rel=1e-6))


def test_nan_is_nan_and_no_number_is_like_it(folder: Path, tmp_path: Path) -> None:
    a, b = (Path(shutil.copy(folder / "m.gguf", tmp_path / name)) for name in ("a.gguf", "b.gguf"))
    for path in (a, b):
        data_of(path)[GATE].view(np.float32)[1, 1] = np.nan
    assert llamatools.diff(a, b).same
    data_of(b)[GATE].view(np.float32)[1, 1] = 1
    found = llamatools.diff(a, b)
    assert (found.tensors[0].name, found.same) == (GATE, False)
    assert np.isnan(found.tensors[0].error or 0)


def test_quantized_against_its_original(folder: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "q.gguf", random_weights(TINY), TINY, matrices=Q8_0)
    found = llamatools.diff(folder / "m.gguf", path)
    a = random_weights(TINY)["layers.0.attention.wq.weight"].astype(np.float64)
    b = gguf.quants.dequantize(gguf.quants.quantize(a.astype(np.float32), Q8_0), Q8_0)
    (error,) = (tensor.error for tensor in found.tensors if tensor.name == Q)
    assert error == pytest.approx(np.sqrt(np.square(b - a).sum() / np.square(a).sum()), rel=1e-5)


def test_what_else_differs(folder: Path, tmp_path: Path) -> None:
    tokenizer = folder / "meta" / "tokenizer.model"
    extra = {"general.name": "LLaMA", "general.url": "a"}
    a = write_gguf(tmp_path / "a.gguf", random_weights(TINY), TINY, tokenizer=tokenizer, extra=extra)
    extra = {"general.name": "Other", "tokenizer.ggml.padding_token_id": 5, "llama.rope.freq_base_train": 1.0}
    text = a.read_bytes()
    assert text.count(b"<0x0A>") == 1
    b = write_gguf(tmp_path / "b.gguf", random_weights(TINY), TINY, tokenizer=tokenizer, extra=extra)
    b.write_bytes(b.read_bytes().replace(b"<0x0A>", b"<0x0Z>"))
    found = llamatools.diff(a, b)
    assert found.fields == (
        ("tokenizer tokens, item 13", "'<0x0A>'", "'<0x0Z>'"),
        ("tokenizer special padding", "none", "5"),
        ("general.name", "'LLaMA'", "'Other'"),
        ("general.url", "string 'a'", "none"),
    )
    found = llamatools.diff(folder / "m.gguf", folder / "hf")
    assert found.fields == ()


def test_without_a_config_the_order_of_rows_is_not_known(folder: Path) -> None:
    path = folder / "hf" / "model.safetensors"
    found = llamatools.diff(folder / "m.gguf", path)
    assert (
        found.not_compared[-1] == f"the order of rows of 6 q and k tensors of {path}: there is no config.json beside it"
    )
    (how,) = (tensor.how for tensor in found.tensors if tensor.name == Q)
    assert how == "F32, but the rows of B are in Hugging Face's order, where Meta's is due"
