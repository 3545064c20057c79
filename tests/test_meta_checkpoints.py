"""The maker of Meta checkpoints, held against Meta's shapes and against torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import meta_checkpoints as meta
import pytest
import torch
from tiny_llamas import STORIES, TINY, needs_stories, random_weights

from llamatools.checkpoint import Hyperparameters
from llamatools.formats.meta_params import hidden_dim_by_formula

STATE = {name: torch.from_numpy(array) for name, array in random_weights(TINY).items()}
STATE["rope.freqs"] = meta.rope_freqs(TINY)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", [meta.LLAMA_2, meta.LLAMA_3])
@pytest.mark.parametrize("n_shards", [1, 2, 4])
def test_shards_join_to_the_whole(tmp_path: Path, n_shards: int, axis: meta.Axis, dtype: torch.dtype | None) -> None:
    folder = meta.write_meta(
        tmp_path / "model",
        STATE,
        meta.params_of(TINY),
        b"vocabulary",
        n_shards=n_shards,
        embedding_axis=axis,
        dtype=dtype,
    )
    shards = [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]
    assert len(shards) == n_shards
    whole = meta.join(shards, axis)
    for name, tensor in STATE.items():
        assert torch.equal(whole[name], tensor.to(dtype)), name
    assert (folder / "tokenizer.model").read_bytes() == b"vocabulary"
    assert not (folder / "checklist.chk").exists()


def test_shapes_are_those_of_llama_2_13b_and_llama_3_70b() -> None:
    """Sources: the real checkpoints; meta-llama/llama model.py, llama-models model.py."""
    llama_2 = {
        "tok_embeddings.weight": torch.empty(32000, 5120, device="meta"),
        "layers.39.attention.wo.weight": torch.empty(5120, 5120, device="meta"),
        "layers.39.feed_forward.w1.weight": torch.empty(13824, 5120, device="meta"),
        "layers.39.feed_forward.w2.weight": torch.empty(5120, 13824, device="meta"),
        "norm.weight": torch.empty(5120, device="meta"),
    }
    assert {name: tuple(part.shape) for name, part in meta.shard(llama_2, 1, 2, meta.LLAMA_2).items()} == {
        "tok_embeddings.weight": (32000, 2560),
        "layers.39.attention.wo.weight": (5120, 2560),
        "layers.39.feed_forward.w1.weight": (6912, 5120),
        "layers.39.feed_forward.w2.weight": (5120, 6912),
        "norm.weight": (5120,),
    }
    llama_3 = {
        "tok_embeddings.weight": torch.empty(128256, 8192, device="meta"),
        "layers.0.attention.wk.weight": torch.empty(1024, 8192, device="meta"),
        "output.weight": torch.empty(128256, 8192, device="meta"),
    }
    assert {name: tuple(part.shape) for name, part in meta.shard(llama_3, 0, 8, meta.LLAMA_3).items()} == {
        "tok_embeddings.weight": (16032, 8192),
        "layers.0.attention.wk.weight": (128, 8192),
        "output.weight": (16032, 8192),
    }


def test_storages_are_no_larger_than_their_tensors() -> None:
    for name, part in meta.shard(STATE, 1, 2, meta.LLAMA_2).items():
        assert part.is_contiguous(), name
        assert part.untyped_storage().nbytes() == part.nbytes, name


def test_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"tok_embeddings.weight: axis 0 of \(300, 64\) does not divide into 7 shards"):
        meta.shard(STATE, 0, 7, meta.LLAMA_3)


def test_checklist_holds_md5_sums(tmp_path: Path) -> None:
    meta.write_meta(tmp_path, STATE, meta.params_of(TINY), b"vocabulary", n_shards=2, checklist=True)
    lines = (tmp_path / "checklist.chk").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == [
        "consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model",
    ]  # fmt: skip
    assert lines[3] == f"{hashlib.md5(b'vocabulary').hexdigest()}  tokenizer.model"


@pytest.mark.parametrize(("dim", "hidden_dim"), [(64, 96), (256, 768), (2048, 8192), (4096, 11008), (2048, 5632)])
def test_params_give_the_hidden_width_by_metas_formula(dim: int, hidden_dim: int) -> None:
    h = Hyperparameters(dim, hidden_dim, 2, 8, 4, dim // 8, 300, 1e-5, 10000.0, 128)
    params = json.loads(json.dumps(meta.params_of(h)))
    assert hidden_dim_by_formula(dim, params["multiple_of"], params["ffn_dim_multiplier"]) == hidden_dim
    assert "head_dim" not in params


def test_tied() -> None:
    assert torch.equal(meta.tied(STATE)["output.weight"], STATE["tok_embeddings.weight"])
    assert "output.weight" not in meta.tied(STATE, stored=False)
    assert len(meta.tied(STATE)) == len(STATE)


@needs_stories
def test_rope_freqs_are_as_stories260k_carries_them() -> None:
    state, params, tokenizer = meta.read_one_shard(STORIES)
    h = Hyperparameters(64, 172, 5, 8, 4, 8, 512, 1e-5, 10000.0, 512)
    assert torch.allclose(meta.rope_freqs(h), state["rope.freqs"], rtol=1e-6)
    assert params["vocab_size"] == -1
    assert tokenizer == (STORIES / "tokenizer.model").read_bytes()
