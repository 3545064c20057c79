"""Hugging Face folders: written by transformers, safetensors and tokenizers, and damaged file by file."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import llamatools
from llamatools.check import SEVERITIES
from llamatools.checkpoint import Hyperparameters, RopeScaling
from llamatools.errors import FormatError, LlamatoolsError, UnsupportedError
from llamatools.formats import hf_config
from llamatools.formats.hf import read_hf

INDEX = "model.safetensors.index.json"
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as transformers saves it, in six files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("saved")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=300, max_position_embeddings=128, rope_parameters={"rope_theta": 5e5, **LLAMA_3},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100KB")
    return folder


def test_a_folder_by_transformers(saved: Path) -> None:
    names = sorted(path.name for path in saved.glob("*.safetensors"))
    assert len(names) == 6
    theirs = {}
    for name in names:
        with safe_open(saved / name, "np") as file:
            theirs |= {key: (name, file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 (no dict)
    for path in (saved, saved / INDEX):
        layout = llamatools.inspect(path)
        assert (layout.format, layout.problems) == ("Hugging Face", ())
        assert [file.path.name for file in layout.files] == [*names, INDEX, "config.json"]
        assert {t.name: (layout.files[t.file].path.name, t.shape) for t in layout.tensors} == {
            key: (name, array.shape) for key, (name, array) in theirs.items()
        }
    assert layout.hparams == Hyperparameters(
        dim=64, hidden_dim=96, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=8, vocab_size=300, norm_eps=1e-6,
        rope_theta=5e5, max_seq_len=128, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
    )  # fmt: skip
    config = json.loads((saved / "config.json").read_text())
    assert layout.metadata["format"].data == "pt"
    assert layout.metadata["config.vocab_size"].data == config["vocab_size"]
    assert layout.metadata["config.rms_norm_eps"].data == config["rms_norm_eps"]
    assert layout.metadata["config.model_type"].data == "llama"
    assert json.loads(layout.metadata["config.rope_parameters"].data) == config["rope_parameters"]
    assert [note.what for note in layout.notes] == ["tokenizer"]

    checkpoint = llamatools.open(saved)
    assert checkpoint.scheme == "hf"
    assert checkpoint.hparams == layout.hparams
    for key, (_, array) in theirs.items():
        tensor = checkpoint.tensors[key]
        assert tensor.read(0, tensor.n_rows).tobytes() == array.tobytes()


# What is passed to transformers' LlamaConfig, and the fields of hyperparameters that follow.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"rope_theta": 10000.0, "rope_scaling": None, "n_kv_heads": 8, "head_dim": 8, "max_seq_len": 2048}),
    "head_dim": ({"head_dim": 16}, {"head_dim": 16}),
    "norm_eps": ({"rms_norm_eps": 1e-5}, {"norm_eps": 1e-5}),
    "older spelling": ({"rope_theta": 1e6, "rope_scaling": LLAMA_3}, {"rope_theta": 1e6, "factor": 8.0}),
    "newer spelling": ({"rope_parameters": {"rope_theta": 1e6, **LLAMA_3}}, {"rope_theta": 1e6, "factor": 8.0}),
    "tied": ({"tie_word_embeddings": True}, {"note": "output"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_configurations_by_transformers(variant: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaConfig

    given, wanted = VARIANTS[variant]
    LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8, vocab_size=300, **given
    ).save_pretrained(tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)
    h, notes = hf_config.hyperparameters(json.loads((tmp_path / "config.json").read_text()))
    assert (h.n_kv_heads, h.head_dim, h.norm_eps) == (theirs.num_key_value_heads, theirs.head_dim, theirs.rms_norm_eps)
    assert (h.max_seq_len, h.rope_theta) == (theirs.max_position_embeddings, theirs.rope_parameters["rope_theta"])
    assert (h.rope_scaling is not None) is (theirs.rope_parameters["rope_type"] == "llama3")
    found = {**vars(h), "factor": h.rope_scaling and h.rope_scaling.factor, "note": "".join(n.what for n in notes)}
    assert {key: found[key] for key in wanted} == wanted


CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 8, "vocab_size": 300, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 128,
}  # fmt: skip


def test_what_config_leaves_out_is_told(tmp_path: Path) -> None:
    from transformers import AutoConfig

    few = {key: value for key, value in CONFIG.items() if key not in hf_config.DEFAULTS}
    (tmp_path / "config.json").write_text(json.dumps(few))
    theirs = AutoConfig.from_pretrained(tmp_path)
    h, notes = hf_config.hyperparameters(few)
    assert {note.what: note.value for note in notes} == {
        "rms_norm_eps": f"{theirs.rms_norm_eps:g}",
        "rope_theta": f"{theirs.rope_parameters['rope_theta']:g}",
        "max_position_embeddings": str(theirs.max_position_embeddings),
    }
    assert (h.norm_eps, h.max_seq_len) == (theirs.rms_norm_eps, theirs.max_position_embeddings)


FIRST_SPELLING = {"type": "llama3"} | {key: value for key, value in LLAMA_3.items() if key != "rope_type"}


def test_rope_by_its_first_name_and_in_both_places() -> None:
    for more in ({"rope_scaling": FIRST_SPELLING}, {"rope_scaling": LLAMA_3, "rope_parameters": FIRST_SPELLING}):
        assert hf_config.hyperparameters(CONFIG | more)[0].rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)


CONFIG_REFUSED: dict[str, tuple[dict[str, Any], type[LlamatoolsError], str]] = {
    "missing": ({"hidden_size": None}, FormatError, "key 'hidden_size': required, but missing"),
    "text": ({"hidden_size": "64"}, FormatError, "key 'hidden_size': '64' where a number from 0 to 2^31 is required"),
    "truth": ({"vocab_size": True}, FormatError, "key 'vocab_size': True where a number"),
    "negative": ({"rope_theta": -1.0}, FormatError, "key 'rope_theta': -1.0 where a number from 0 to 2^31"),
    "huge": ({"vocab_size": 10**400}, FormatError, "000 where a number from 0 to 2^31 is required"),
    "fraction": ({"vocab_size": 300.5}, FormatError, "key 'vocab_size': 300.5 where a whole number is required"),
    "context": ({"max_position_embeddings": 1.5}, FormatError, "key 'max_position_embeddings': 1.5 where a whole"),
    "layers": ({"num_hidden_layers": 5000}, FormatError, "key 'num_hidden_layers': 5000, where 1024 are allowed"),
    "head_dim": ({"hidden_size": 65}, FormatError, "key 'head_dim': required, but missing"),
    "odd": ({"head_dim": 9}, FormatError, "key 'head_dim': 9 is odd, and rotary embedding turns pairs"),
    "kv heads": ({"num_key_value_heads": 3}, FormatError, "key 'num_key_value_heads': 8 heads do not divide by 3"),
    "scaling list": ({"rope_scaling": [1]}, FormatError, "key 'rope_scaling': [1] where an object is required"),
    "factor": (
        {"rope_scaling": LLAMA_3 | {"factor": None}},
        FormatError,
        "key 'factor': required by RoPE of type 'llama3', but missing",
    ),
    "two factors": (
        {"rope_scaling": LLAMA_3, "rope_parameters": LLAMA_3 | {"factor": 32.0}},
        FormatError,
        "key 'factor': 8.0 at the top or in rope_scaling, but 32.0 in rope_parameters",
    ),
    "another model": (
        {"model_type": "qwen2"},
        UnsupportedError,
        "key 'model_type': it is 'qwen2', where 'llama' is read",
    ),
    "biases": ({"attention_bias": True}, UnsupportedError, "key 'attention_bias': True, where a LLaMA has False"),
    "activation": ({"hidden_act": "gelu"}, UnsupportedError, "key 'hidden_act': 'gelu', where a LLaMA has 'silu'"),
    "quantized": (
        {"quantization_config": {"bits": 4}},
        UnsupportedError,
        "key 'quantization_config': {'bits': 4}, where a LLaMA has None",
    ),
    "yarn": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        UnsupportedError,
        "key 'rope_type': RoPE of type 'yarn', where default and llama3 are read",
    ),
    "partial": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        UnsupportedError,
        "key 'partial_rotary_factor': 0.5, where a LLaMA has 1.0",
    ),
}


@pytest.mark.parametrize("case", CONFIG_REFUSED)
def test_config_refused(case: str) -> None:
    change, kind, said = CONFIG_REFUSED[case]
    with pytest.raises(kind, match=re.escape(said)) as error:
        hf_config.hyperparameters(CONFIG | change)
    assert type(error.value) is kind


def sharded(folder: Path) -> dict[str, Any]:
    """Two files of two tensors each; their index."""
    weight_map = {}
    for n, name in enumerate(("a.safetensors", "b.safetensors")):
        tensors = {f"t{2 * n + i}": np.full(4, 2 * n + i, np.float32) for i in range(2)}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 64}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return index


def test_an_index_that_counts_bytes_wrongly_is_read(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    assert "total_size" not in {note.what for note in read_hf(tmp_path).notes}
    (tmp_path / INDEX).write_text(json.dumps(index | {"metadata": {"total_size": 32}}))
    [note] = [note for note in read_hf(tmp_path).notes if note.what == "total_size"]
    assert (note.value, note.reason) == ("64", "the tensors' bytes; the index says 32")


def test_metadata_on_which_files_differ(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({f"t{n}": np.zeros(4, np.float32) for n in (2, 3)}, tmp_path / "b.safetensors", {"format": "np"})
    metadata = read_hf(tmp_path).metadata
    assert (metadata["format"].data, metadata["b.safetensors: format"].data) == ("pt", "np")


PLACES = {"t0": "a.safetensors", "t1": "a.safetensors", "t2": "b.safetensors", "t3": "b.safetensors"}

# What the weight_map is changed by, and what is said.
INDEX_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "up": (
        {"t0": "../a.safetensors"},
        f"{INDEX}: tensor 't0': '../a.safetensors' is no plain name of a safet",
    ),
    "absolute": (
        {"t0": "/a.safetensors"},
        "'/a.safetensors' is no plain name of a safetensors file. An index names",
    ),
    "below": ({"t0": "x/a.safetensors"}, "'x/a.safetensors' is no plain name"),
    "backslash": ({"t0": "..\\a.safetensors"}, "is no plain name of a safetensors file"),
    "zero byte": ({"t0": "a\0.safetensors"}, "is no plain name of a safetensors file"),
    "another kind": ({"t0": "config.json"}, "'config.json' is no plain name of a safetensors file"),
    "number": ({"t0": 7}, "tensor 't0': 7 is no plain name of a safetensors file"),
    "absent": ({"t0": "c.safetensors"}, f"{INDEX}: 1 of the 3 files that it names is missing: c.safetensors. Download"),
    "many absent": (
        {f"x{n}": f"x{n}.safetensors" for n in range(9)},
        "9 of the 11 files that it names are missing: x0.safetensors, x1.safetensors, x2.safetensors, x3.safetensors, "
        "x4.safetensors and others. Download them into its folder",
    ),
    "elsewhere": (
        {"t0": "b.safetensors"},
        f"{INDEX}: tensor 't0': a.safetensors holds it, but the index puts it into b.safetensors",
    ),
    "nowhere": ({"t0": None}, f"{INDEX}: tensor 't0': a.safetensors holds it, but the index does not name it"),
    "not there": (
        {"t9": "a.safetensors"},
        f"{INDEX}: tensor 't9': the index puts it into a.safetensors, which does not hold it",
    ),
}


@pytest.mark.parametrize("case", INDEX_REFUSED)
def test_index_refused(case: str, tmp_path: Path) -> None:
    index = sharded(tmp_path)
    change, said = INDEX_REFUSED[case]
    weight_map = {key: value for key, value in (PLACES | change).items() if value is not None}
    (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
    for path in (tmp_path, tmp_path / INDEX):
        with pytest.raises(FormatError, match=re.escape(said)) as error:
            llamatools.open(path)
        assert error.value.code in SEVERITIES


# The bytes of a JSON file, and what is said of them.
JSON_REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "web page": (b"<!doctype html>", "a web page of 15 bytes, not a model"),
    "cut": (b'{"weight_map": {', "it is no JSON (Expecting property name"),
    "list": (b"[]", "a JSON object is required"),
    "deep": (b'{"a":' + b"[" * 100_000, "it is nested too deeply"),
    "long number": (b'{"a":' + b"1" * 5000 + b"}", "it is no JSON (Exceeds the limit (4300 digits)"),
    "NaN": (b'{"a":NaN}', "it is no JSON (NaN stands in it)"),
    "no UTF-8": (b'{"a":"\xff"}', "it is no JSON ('utf-8' codec can't decode byte 0xff"),
    "key twice": (b'{"a":1,"a":2}', "the key 'a' stands twice in one object"),
    "long": (b'{"a":"' + b"x" * (33 << 20), f"over {32 << 20} bytes, more than a file of its kind needs"),
    "no map": (b'{"metadata":{}}', "no weight_map in it that gives each tensor's file. It is no index of weights"),
    "empty map": (b'{"weight_map":{}}', "no weight_map in it"),
    "map list": (b'{"weight_map":["a"]}', "no weight_map in it"),
}


@pytest.mark.parametrize("case", JSON_REFUSED)
def test_json_refused(case: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    data, said = JSON_REFUSED[case]
    (tmp_path / INDEX).write_bytes(data)
    with pytest.raises(FormatError, match=re.escape(said)) as error:
        llamatools.open(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / INDEX}: ")


def test_an_index_cut_anywhere(tmp_path: Path) -> None:
    sharded(tmp_path)
    text = (tmp_path / INDEX).read_bytes()
    for size in range(len(text)):
        (tmp_path / INDEX).write_bytes(text[:size])
        with pytest.raises(FormatError):
            read_hf(tmp_path)


def test_folders_that_hold_no_model_or_two(tmp_path: Path) -> None:
    for name in ("config.json", INDEX):
        sharded(tmp_path)
        (tmp_path / ("config.json" if name == INDEX else INDEX)).unlink()
        if name == "config.json":
            said = f"{tmp_path}: no weights in it: neither model.safetensors nor {INDEX}. Download the folder again"
            with pytest.raises(FormatError, match=re.escape(said)):
                llamatools.open(tmp_path)
    notes = {note.what: note.reason for note in llamatools.inspect(tmp_path).notes}
    assert notes["hyperparameters"] == "there is no config.json"
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="model.safetensors lies beside it, which it does not name. Remove one"):
        llamatools.open(tmp_path)
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(FormatError, match="both a Meta checkpoint and Hugging Face's files are in it. Move one"):
        llamatools.open(tmp_path)


def test_a_pipe_in_the_place_of_weights_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="no weights in it"):
        llamatools.open(tmp_path)


def test_weights_in_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    said = "its weights are in pytorch_model-00001-of-00002.bin, which holds a pickle. Save them again with safe_serial"
    with pytest.raises(UnsupportedError, match=said):
        llamatools.inspect(tmp_path)


def test_another_architecture_is_listed_without_hyperparameters(tmp_path: Path) -> None:
    save_file({"w": np.zeros((2, 3), np.float16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "qwen2"}))
    layout = llamatools.inspect(tmp_path)
    assert [tensor.name for tensor in layout.tensors] == ["w"]
    assert layout.hparams is None
    assert layout.notes[0].reason == "config.json: key 'model_type': it is 'qwen2', where 'llama' is read"
    assert layout.metadata["config.model_type"].data == "qwen2"


def test_what_is_left_of_a_folder_is_shown(tmp_path: Path, sentencepiece_model: bytes) -> None:
    sharded(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    assert len(llamatools.inspect(tmp_path).tokenizer.tokens) == 300  # type: ignore[union-attr]
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    layout = llamatools.inspect(tmp_path)
    assert [tensor.name for tensor in layout.tensors] == ["t2", "t3"]
    assert [(Path(str(p.file)).name, p.code) for p in layout.problems] == [
        (INDEX, "shard-missing"),
        ("config.json", "damaged"),
        ("tokenizer.model", "empty"),
    ]
    (tmp_path / "b.safetensors").write_bytes(b"")
    assert [p.code for p in llamatools.inspect(tmp_path).problems][1] == "empty"
