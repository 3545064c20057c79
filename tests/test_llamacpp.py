"""The harness around llama.cpp itself, held against gguf-py and against text whose author says what it is."""

from __future__ import annotations

from pathlib import Path

import gguf
import llamacpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from tiny_llamas import STORIES, TINY, needs_stories, random_weights, stories, write_gguf

TOKENIZER = STORIES / "tokenizer.model"


@pytest.fixture(scope="module")
def stories_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("stories") / "stories.gguf", *stories(), tokenizer=TOKENIZER)


@needs_stories
def test_greedy_recites_what_the_author_of_stories260k_says(stories_gguf: Path) -> None:
    with llamacpp.Model(stories_gguf) as model:
        ids = model.greedy([model.bos_id], 500, stop=[model.bos_id])
        text = model.detokenize(ids[:256]).decode()  # llama2.c's program stops there unless told otherwise
    assert text.strip() == (STORIES / "expected.txt").read_text().strip()
    assert ids.index(model.bos_id) == len(ids) - 1 < 499  # the story ends by itself


@needs_stories
def test_text_becomes_sentencepiece_ids_and_text_again(stories_gguf: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    text = "Once upon a time, Zoë saw a 🐲."
    with llamacpp.Model(stories_gguf) as model:
        ids = model.tokenize(text)
        assert ids == [model.bos_id, *SentencePieceProcessor(model_file=str(TOKENIZER)).encode(text)]
        assert model.detokenize(ids[1:]).decode().strip() == text
        assert b"<s>" in model.detokenize(ids, special=True)


@needs_stories
def test_one_batch_one_by_one_and_every_option_agree(stories_gguf: Path) -> None:
    with llamacpp.Model(stories_gguf) as model:
        ids = model.tokenize("Once upon a time, there was a little girl named Lily.")
        logits = model.logits(ids)
        assert logits.shape == (len(ids), model.n_vocab) == (len(ids), 512)
        assert np.allclose(model.logits(ids[:7]), logits[:7], atol=1e-4)
        assert model.greedy(ids, 1) == [logits[-1].argmax()]
        assert model.greedy(ids, 3)[:2] == model.greedy(ids, 2)
    with llamacpp.Model(stories_gguf, n_threads=1, f32_cache=False, flash_attention=True, repack=True) as model:
        coarse = model.logits(ids)
    assert 0 < abs(coarse - logits).max() < 0.05  # float16 keys and values are less exact, and are really used


@needs_stories
def test_more_tokens_than_the_context_holds(stories_gguf: Path) -> None:
    with llamacpp.Model(stories_gguf, n_ctx=256) as model:
        with pytest.raises(llamacpp.LlamaCppError, match=r"llama_decode returned 1|failed to find a memory slot"):
            model.greedy([1], 300)


@needs_stories
def test_load_error(stories_gguf: Path, tmp_path: Path) -> None:
    assert llamacpp.load_error(stories_gguf) is None

    cut = tmp_path / "cut.gguf"
    cut.write_bytes(stories_gguf.read_bytes()[:-4096])
    assert "model is corrupted or incomplete" in (llamacpp.load_error(cut) or "")
    with pytest.raises(llamacpp.LlamaCppError, match="model is corrupted or incomplete"):
        llamacpp.Model(cut)

    weights, h = stories()
    del weights["layers.3.attention.wo.weight"]
    lacking = write_gguf(tmp_path / "lacking.gguf", weights, h, tokenizer=TOKENIZER)
    assert "tensor 'blk.3.attn_output.weight' not found" in (llamacpp.load_error(lacking) or "")


@needs_stories
def test_load_error_survives_an_abort(stories_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "two-tokens-of-one-text.gguf"
    path.write_bytes(stories_gguf.read_bytes().replace(b"<0x41>", b"<0x42>"))
    said = llamacpp.load_error(path) or ""
    assert "SIGABRT" in said
    assert "GGML_ASSERT(id_to_token.size() == token_to_id.size()) failed" in said


def test_load_error_of_no_file(tmp_path: Path) -> None:
    assert "No such file" in (llamacpp.load_error(tmp_path / "none.gguf") or "")


def test_header_is_as_gguf_py_reads_it(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_weights(TINY), TINY, matrices=Type.Q8_0)
    reader = gguf.GGUFReader(path)
    header = llamacpp.read_gguf(path)
    assert (header.version, header.alignment, header.data_offset) == (3, reader.alignment, reader.data_offset)
    assert header.keys == tuple(key for key in reader.fields if not key.startswith("GGUF."))
    assert header.tensors == {
        t.name: llamacpp.GGUFTensor(
            t.tensor_type, tuple(map(int, reversed(t.shape))), t.data_offset - reader.data_offset, t.n_bytes
        )
        for t in reader.tensors
    }


def test_header_of_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_bytes(b"<!doctype html>" * 10)
    with pytest.raises(llamacpp.LlamaCppError, match="invalid magic"):
        llamacpp.read_gguf(path)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0])
def test_quantize_as_gguf_py_does(kind: Type) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 512)).astype(np.float32)
    blocks = llamacpp.quantize(kind, rows)
    assert np.array_equal(blocks, gguf.quants.quantize(rows, kind).view(np.uint8))
    assert np.array_equal(llamacpp.dequantize(kind, blocks, 512), gguf.quants.dequantize(blocks, kind))


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS])
def test_quantize_with_importance(kind: Type) -> None:
    draws = np.random.default_rng(1)
    rows = draws.standard_normal((4, 512)).astype(np.float32)
    importance = draws.exponential(size=512).astype(np.float32) ** 3
    errors = []
    for imatrix in (None, importance):
        blocks = llamacpp.quantize(kind, rows, imatrix)
        assert (
            blocks.shape == (4, llamacpp.row_nbytes(kind, 512)) == gguf.quants.quant_shape_to_byte_shape((4, 512), kind)
        )
        decoded = llamacpp.dequantize(kind, blocks, 512)
        assert np.allclose(decoded, gguf.quants.dequantize(blocks, kind), atol=1e-6)
        errors.append(float((importance * (rows - decoded) ** 2).sum()))
    assert errors[1] < errors[0]


def test_what_quantize_cannot_do() -> None:
    rows = np.ones((2, 256), np.float32)
    with pytest.raises(ValueError, match="rows of 100 do not divide into q4_0 blocks"):
        llamacpp.quantize(Type.Q4_0, rows[:, :100])
    with pytest.raises(ValueError, match="requires an importance matrix"):
        llamacpp.quantize(Type.IQ2_XXS, rows)
    with pytest.raises(ValueError, match=r"importance for \(128,\) columns, where rows have 256"):
        llamacpp.quantize(Type.Q4_0, rows, rows[0, :128])
    with pytest.raises(ValueError, match=r"rows of \(10,\) bytes, where 144 are needed"):
        llamacpp.dequantize(Type.Q4_0, np.zeros((2, 10), np.uint8), 256)
