"""What is said of a Meta checkpoint whose files are missing, damaged or of different models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from meta_checkpoints import StateDict, params_of, write_meta
from tiny_llamas import TINY, random_weights

import llamatools
from llamatools.errors import FormatError, LlamatoolsError
from llamatools.formats.meta import MetaOptions, open_meta, verify_source
from llamatools.formats.meta_params import Overrides
from llamatools.plan import plan_gguf

EMBEDDING, WQ = "tok_embeddings.weight", "layers.0.attention.wq.weight"
OF_ANOTHER = "Shards are missing, or params.json is of another model"
OPTIONS = MetaOptions(overrides=Overrides(context=64))


def make(folder: Path, tokenizer: bytes, **more: torch.Tensor) -> Path:
    """TINY in two shards with a checklist. more: tensors by name, in place of the model's own."""
    state: StateDict = {name: torch.from_numpy(array) for name, array in random_weights(TINY).items()}
    return write_meta(folder, state | more, params_of(TINY), tokenizer, n_shards=2, checklist=True)


def edit(folder: Path, shard: int, change: Callable[[StateDict], object]) -> None:
    path = folder / f"consolidated.{shard:02}.pth"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(FormatError) as refused:
        call()
    return str(refused.value)


def test_shards_that_are_missing(tmp_path: Path, sentencepiece_model: bytes) -> None:
    source = make(tmp_path / "m", sentencepiece_model)
    (source / "consolidated.00.pth").unlink()
    said = "consolidated.00.pth is missing, though consolidated.01.pth is there. Download the checkpoint again"
    assert refusal(lambda: open_meta(source)) == f"{source}: {said}"
    (source / "consolidated.01.pth").unlink()
    with pytest.raises(LlamatoolsError) as refused:
        llamatools.open(source)
    said = "no consolidated.00.pth here. Name the folder that holds a Meta checkpoint"
    assert str(refused.value) == f"{source}: {said}"


@pytest.mark.parametrize(
    ("shard", "change", "said"),
    [
        (
            1,
            lambda state: state.update({"layers.9.bias": torch.zeros(1)}),
            "consolidated.01.pth: unknown tensor 'layers.9.bias'. A LLaMA of 3 layers has no such tensor",
        ),
        (1, lambda state: state.pop(WQ), f"consolidated.01.pth: tensor {WQ!r} is missing"),
        (1, lambda state: state.pop("output.weight"), "consolidated.01.pth: tensor 'output.weight' is missing"),
        (
            0,
            lambda state: state.update({EMBEDDING: torch.zeros(300, 48)}),
            f"tensor {EMBEDDING!r}: [300, 48] in each of 2 shards does not make rows of dim 64. {OF_ANOTHER}",
        ),
        (
            0,
            lambda state: state.update({WQ: torch.zeros(16, 64)}),
            f"tensor {WQ!r}: shape [16, 64] in each of 2 shards, where params.json asks for [64, 64]. {OF_ANOTHER}",
        ),
    ],
    ids=["unknown", "missing", "output missing", "embedding", "shape"],
)
def test_shards_that_do_not_fit(
    tmp_path: Path, sentencepiece_model: bytes, shard: int, change: Callable[[StateDict], object], said: str
) -> None:
    source = make(tmp_path / "m", sentencepiece_model)
    edit(source, shard, change)
    assert refusal(lambda: open_meta(source)) == f"{source}: {said}"


def test_a_shape_in_one_shard(tmp_path: Path, sentencepiece_model: bytes) -> None:
    state = {name: torch.from_numpy(array) for name, array in random_weights(TINY).items()}
    source = write_meta(tmp_path / "m", state | {WQ: torch.zeros(16, 64)}, params_of(TINY), sentencepiece_model)
    said = f"tensor {WQ!r}: shape [16, 64], where params.json asks for [64, 64]. {OF_ANOTHER}"
    assert refusal(lambda: open_meta(source)) == f"{source}: {said}"


@pytest.mark.parametrize(
    ("n_rows", "todo"), [(302, "Add --pad-vocab to fill up with unused tokens"), (298, "It is of another model")]
)
def test_a_vocabulary_of_another_size(tmp_path: Path, sentencepiece_model: bytes, n_rows: int, todo: str) -> None:
    rows = torch.zeros(n_rows, TINY.dim)
    source = make(tmp_path / "m", sentencepiece_model, **{EMBEDDING: rows, "output.weight": rows})
    said = f"300 tokens, but the embedding has {n_rows} rows. {todo}"
    assert refusal(lambda: open_meta(source)) == f"{source / 'tokenizer.model'}: {said}"


def test_checklists(tmp_path: Path, sentencepiece_model: bytes) -> None:
    source = make(tmp_path / "m", sentencepiece_model)
    assert len(verify_source(source)) == 6  # four MD5 sums, two shards
    params, checklist = source / "params.json", source / "checklist.chk"
    expected = hashlib.md5(params.read_bytes()).hexdigest()
    params.write_text(params.read_text() + "\n")
    actual = hashlib.md5(params.read_bytes()).hexdigest()
    said = f"its MD5 sum is {actual}, but checklist.chk says {expected}. Download it again"
    assert refusal(lambda: verify_source(source)) == f"{params}: {said}"
    for line in ("frobnicate", f"{actual}  ../params.json"):
        checklist.write_text(f"{actual}  params.json\n{line}\n")
        assert refusal(lambda: verify_source(source)) == f"{checklist}: line 2: not an MD5 sum and a file name"


def test_tensors_alone_make_no_gguf(tmp_path: Path, sentencepiece_model: bytes) -> None:
    checkpoint = open_meta(make(tmp_path / "m", sentencepiece_model), OPTIONS)
    said = "no hyperparameters: a GGUF cannot be made from tensors alone. Name the whole folder"
    assert refusal(lambda: plan_gguf(replace(checkpoint, hparams=None), tmp_path / "m.gguf")) == said
