"""Perplexity and divergence are what llama-perplexity's rules make of llama.cpp's logits."""

import json
import math
from pathlib import Path

import llamacpp
import numpy as np
import pytest
import torch
from llamatools_runtime.quality import measure
from tiny_llamas import STORIES, TINY, needs_stories, random_weights, write_gguf

import llamatools
from llamatools.errors import FormatError, UnsupportedError, UsageError
from llamatools.tensors import read_floats

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
CONTEXT = 64
OPTIONS = llamatools.MetaOptions(overrides=llamatools.Overrides(context=256))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Its beginning the model knows by heart, the rest it was never shown."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    known = (FIXTURE / "text.txt").read_text("utf-8")[:150]
    path.write_text(known + "\n\nIt is a truth universally acknowledged, Mr. Bennet, that Zoë paid 12 € for ham. " * 6)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "f32.gguf"
    llamatools.convert(FIXTURE, path, dtype="f32", options=OPTIONS)
    return path


@pytest.fixture(scope="module")
def rounded(sound):
    path = sound.with_name("q4_0.gguf")
    llamatools.quantize(sound, path, "q4_0")
    return path


def llamacpp_chunks(path, text, n_chunks):
    """Log probabilities (n_scored, vocab_size) before each scored token, and the tokens, from llama.cpp's logits.

    Written after the loop in llama.cpp's perplexity.cpp: windows of n_ctx, BOS put first, outputs from n_ctx / 2 on,
    of which the last foretells a token of the next window and is not used.
    """
    with llamacpp.Model(path, n_ctx=CONTEXT) as model:
        tokens = model.tokenize(text.read_bytes().removesuffix(b"\n"))
        log_probs, targets = [], []
        for n in range(n_chunks):
            window = tokens[n * CONTEXT : (n + 1) * CONTEXT]
            logits = torch.from_numpy(model.logits([model.bos_id, *window[1:]])).double()
            log_probs.append(logits.log_softmax(-1)[CONTEXT // 2 : CONTEXT - 1])
            targets += window[CONTEXT // 2 + 1 :]
    return torch.cat(log_probs), torch.tensor(targets), len(tokens)


def test_perplexity_is_what_llama_cpp_gives(sound, text):
    log_probs, targets, n_tokens = llamacpp_chunks(sound, text, 5)
    quality = measure(sound, text, context=CONTEXT, chunks=5, float32=True)
    assert quality.scores is None
    assert len(quality.surprise) == 5 * 31
    expected = torch.nn.functional.nll_loss(log_probs, targets, reduction="none")
    np.testing.assert_allclose(quality.surprise, expected, atol=2e-4)
    assert quality.perplexity.value == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert [each.value for each in quality.running_perplexity] == pytest.approx(
        [math.exp(expected[: 31 * n].mean()) for n in range(1, 6)], rel=1e-5
    )
    assert measure(sound, text, context=CONTEXT).n_chunks == n_tokens // CONTEXT > 5


@pytest.fixture(scope="module")
def worn(sound):
    """The same in float32, its matrices off by 8 %: what rounding to 4 bits does to them."""
    draws = np.random.default_rng(1)
    tensors = llamatools.open(FIXTURE, OPTIONS).tensors
    weights = {name: read_floats(tensor, 0, tensor.n_rows).reshape(tensor.shape) for name, tensor in tensors.items()}
    for array in weights.values():
        if array.ndim == 2:
            array += 0.08 * array.std() * draws.standard_normal(array.shape, np.float32)
    hparams = llamatools.inspect(sound).hparams
    return write_gguf(sound.with_name("worn.gguf"), weights, hparams, tokenizer=FIXTURE / "tokenizer.model")


# llama.cpp rounds activations to 8 bits before it multiplies them with Q4_0, which adds to the divergence.
@pytest.mark.parametrize(("file", "tolerance"), [("worn", 2e-3), ("rounded", 5e-2)])
def test_divergence_is_what_llama_cpp_gives(sound, text, request, file, tolerance):
    path = request.getfixturevalue(file)
    base, targets, _ = llamacpp_chunks(sound, text, 6)
    model, _, _ = llamacpp_chunks(path, text, 6)
    at = torch.arange(len(targets)), targets
    divergences = torch.nn.functional.kl_div(model, base, reduction="none", log_target=True).sum(-1)
    expected = {
        "base_perplexity": math.exp(-base[at].mean()),
        "log_ratio": (base[at] - model[at]).mean(),
        "mean_divergence": divergences.mean(),
        "median_divergence": divergences.quantile(0.5),
        "percentile99_divergence": divergences.quantile(0.99),
        "same_top": (base.argmax(-1) == model.argmax(-1)).double().mean(),
        "rms_change": (model[at].exp() - base[at].exp()).square().mean().sqrt(),
        "mean_change": (model[at].exp() - base[at].exp()).mean(),
    }
    found = measure(path, text, context=CONTEXT, chunks=6, against=llamatools.open(sound)).against()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].value == pytest.approx(float(value), rel=tolerance, abs=tolerance / 10), name


def test_a_meta_checkpoint_is_the_other_model(rounded, sound, text):
    """It is bfloat16, which F32 holds exactly: both give the same figures, and F32 none."""
    original = llamatools.open(FIXTURE, OPTIONS)
    by_file = measure(rounded, text, context=CONTEXT, chunks=3, against=llamatools.open(sound))
    by_folder = measure(rounded, text, context=CONTEXT, chunks=3, against=original)
    np.testing.assert_allclose(by_folder.scores.divergence, by_file.scores.divergence, rtol=1e-3, atol=1e-6)
    same = measure(sound, text, context=CONTEXT, chunks=3, against=original)
    assert same.scores.divergence.max() < 1e-8
    assert same.against()["same_top"].value == 1


@needs_stories
def test_scaled_rotary_embedding_of_a_meta_checkpoint(tmp_path):
    """The divisors that the file has as a tensor are computed for the folder."""
    params = json.loads((STORIES / "params.json").read_text())
    folder = tmp_path / "scaled"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params | {"use_scaled_rope": True, "rope_theta": 500000.0}))
    for name in ("consolidated.00.pth", "tokenizer.model"):
        (folder / name).symlink_to(STORIES / name)
    options = llamatools.MetaOptions(overrides=llamatools.Overrides(context=512, rope_factor=8.0))
    llamatools.convert(folder, tmp_path / "m.gguf", options=options)
    story = tmp_path / "story.txt"
    story.write_text("Once upon a time there was a little girl named Lily. " * 30)
    quality = measure(tmp_path / "m.gguf", story, context=CONTEXT, chunks=2, against=llamatools.open(folder, options))
    assert quality.scores.divergence.max() < 1e-8


def test_progress_tells_of_all_chunks_so_far(sound, text):
    told = []
    quality = measure(
        sound, text, context=CONTEXT, chunks=3, on_chunk=lambda n, n_chunks, so_far: told.append((n, n_chunks, so_far))
    )
    assert [(n, n_chunks) for n, n_chunks, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert [so_far.perplexity for _, _, so_far in told] == quality.running_perplexity


def test_batches_do_not_change_the_figures(sound, text, monkeypatch):
    expected = measure(sound, text, context=CONTEXT, chunks=2, float32=True)
    monkeypatch.setattr("llamatools_runtime.quality.BATCH", 7)
    found = measure(sound, text, context=CONTEXT, chunks=2, float32=True)
    np.testing.assert_allclose(found.surprise, expected.surprise, atol=1e-4)


def test_json_and_lines(sound, rounded, text):
    alone = measure(sound, text, context=CONTEXT, chunks=2)
    beside = measure(rounded, text, context=CONTEXT, chunks=2, against=llamatools.open(sound))
    assert len(alone.lines()) == 1
    assert all(len(line) <= 80 for line in alone.lines() + beside.lines())
    found = json.loads(json.dumps(beside.as_dict(), allow_nan=False))
    assert found["mean_divergence"]["value"] == pytest.approx(beside.scores.divergence.mean())
    assert found["max_divergence"] == beside.scores.divergence.max()
    assert (found["context"], found["chunks"], found["tokens"]) == (64, 2, 62)
    assert len(found["running_perplexity"]) == 2
    assert "mean_divergence" not in alone.as_dict()


def test_a_text_that_is_too_short_is_refused(sound, tmp_path):
    (tmp_path / "short.txt").write_text("the\n")  # the line end is no token
    with pytest.raises(UsageError, match=r"short\.txt: 2 tokens, but chunks of 64 need at least two, 128 tokens"):
        measure(sound, tmp_path / "short.txt", context=64)


def test_a_text_that_is_not_utf8_is_refused(sound, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"Zo\xeb")
    with pytest.raises(FormatError, match=r"latin\.txt: not UTF-8 text from byte 2 on"):
        measure(sound, tmp_path / "latin.txt")
    with pytest.raises(FormatError, match=r"missing\.txt: no such file or directory"):
        measure(sound, tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 3}, r"^--context: chunks of 3 tokens: of fewer than 4 too little is scored$"),
        ({"context": 64, "chunks": 0}, r"^--chunks: 0 chunks: at least 1 is needed$"),
        ({"context": 257}, r"f32\.gguf: chunks of 257 tokens, but the model's context is 256"),
    ],
)
def test_chunks_that_cannot_be_are_refused(sound, text, options, message):
    with pytest.raises(UsageError, match=message):
        measure(sound, text, **options)


@needs_stories
def test_another_vocabulary_is_refused(sound, text):
    """stories260k has as many tokens, but others."""
    message = r"f32\.gguf: it cuts the text differently from .*stories260k, from token \d+ on\. Probab"
    with pytest.raises(UsageError, match=message):
        measure(sound, text, context=CONTEXT, against=llamatools.open(STORIES, OPTIONS))


def test_a_vocabulary_of_another_size_is_refused(tmp_path, sound, text):
    other = llamatools.open(write_gguf(tmp_path / "other.gguf", random_weights(TINY), TINY))
    with pytest.raises(UsageError, match=r"f32\.gguf: a vocabulary of 512 tokens, but 300 in .*other\.gguf\. Probab"):
        measure(sound, text, context=CONTEXT, against=other)


def test_a_model_that_computes_nan_is_named(tmp_path, sound, text):
    tensors = llamatools.open(FIXTURE, OPTIONS).tensors
    weights = {name: read_floats(tensor, 0, tensor.n_rows).reshape(tensor.shape) for name, tensor in tensors.items()}
    weights["layers.1.attention.wo.weight"][0, 0] = np.nan
    hparams = llamatools.inspect(sound).hparams
    path = write_gguf(tmp_path / "nan.gguf", weights, hparams, tokenizer=FIXTURE / "tokenizer.model")
    for model, against in ((path, sound), (sound, path)):
        with pytest.raises(FormatError, match=r"nan\.gguf: layer 1: NaN or infinity first appears here"):
            measure(model, text, context=CONTEXT, against=llamatools.open(against))


def test_a_model_without_a_vocabulary_is_refused(tmp_path, text):
    path = write_gguf(tmp_path / "m.gguf", random_weights(TINY), TINY)
    with pytest.raises(UnsupportedError, match=r"m\.gguf: it has no vocabulary to read a text with"):
        measure(path, text)
