"""The whole way, on real weights: a Meta checkpoint converted by llamatools, run by us and by llama.cpp, and proven."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llamacpp
import pytest
import torch
from llamatools_runtime import compare, run
from meta_checkpoints import LLAMA_2, LLAMA_3, StateDict, join, tied, write_meta
from tiny_llamas import STORIES, needs_stories

import llamatools
from llamatools import MetaOptions, Overrides

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"


def source(folder: Path, original: Path, **how: Any) -> Path:
    """The checkpoint `original` written anew by torch: in another dtype, cut otherwise, or tied."""
    shards = [torch.load(path, weights_only=True) for path in sorted(original.glob("consolidated.*.pth"))]
    state: StateDict = join(shards, LLAMA_2) if len(shards) > 1 else shards[0]
    state = how.pop("change", lambda state: state)(state)
    params = json.loads((original / "params.json").read_text())
    return write_meta(folder, state, params, (original / "tokenizer.model").read_bytes(), **how)


def converted(folder: Path, **how: Any) -> Path:
    path = folder.with_name(f"{folder.name}-{how.get('alignment', 32)}.gguf")
    llamatools.convert(folder, path, options=MetaOptions(overrides=Overrides(context=512)), **how)
    return path


CUTS = [(1, LLAMA_2), (2, LLAMA_2), (2, LLAMA_3), (4, LLAMA_2), (4, LLAMA_3)]


@needs_stories
@pytest.mark.parametrize(("n_shards", "axis"), CUTS, ids=[f"{n} shards, axis {axis}" for n, axis in CUTS])
def test_stories260k_says_what_its_author_says_however_it_was_cut(tmp_path: Path, n_shards: int, axis: Any) -> None:
    folder = source(tmp_path / "m", STORIES, n_shards=n_shards, embedding_axis=axis)
    report = run(converted(folder, dtype="f32"))
    assert report.text == (STORIES / "expected.txt").read_text().removesuffix("\n")


@needs_stories
@pytest.mark.parametrize(
    "how",
    [
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16, "n_shards": 2, "embedding_axis": LLAMA_2},
        {"change": lambda state: tied(state), "n_shards": 2, "embedding_axis": LLAMA_3},
        {"change": lambda state: tied(state, stored=False)},
    ],
    ids=["f16", "bf16 in 2 shards", "tied in 2 shards", "tied, not stored"],
)
def test_other_variants_are_proven(tmp_path: Path, how: dict[str, Any]) -> None:
    folder = source(tmp_path / "m", STORIES, **how)
    comparison = compare(converted(folder), llamatools.open(folder))
    assert comparison.passed, comparison.lines()
    assert comparison.tolerance.dtype is None  # the file holds the very weights, so the strict bound applies
    assert comparison.n_tokens == 512
    assert comparison.tokenizers_compared


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "original", [pytest.param(STORIES, marks=needs_stories), TINY], ids=["stories260k", "tiny-llama"]
)
def test_llama_cpp_takes_the_same_tokens(tmp_path: Path, original: Path, dtype: torch.dtype) -> None:
    folder = source(tmp_path / "m", original, dtype=dtype)
    # llama.cpp rounds what it multiplies BF16 weights with to BF16, which turns one of this model's choices.
    kept = "f32" if (original, dtype) == (STORIES, torch.bfloat16) else "auto"
    paths = [converted(folder, alignment=alignment, dtype=kept) for alignment in (32, 4096)]
    ours = run(paths[0], max_tokens=200)
    assert len(ours.ids) == 200
    for path in paths:
        with llamacpp.Model(path) as model:
            assert model.greedy([model.bos_id], 200) == list(ours.ids)
