"""What tests share: vocabularies, made by the libraries that Meta used, and models to quantize."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import sentencepiece
from quantizing import weights_of_wide, write_tiny, write_wide
from tiny_llamas import Weights

TEXT = ["the quick brown fox jumps over the lazy dog"] * 5 + ["pack my box with five dozen liquor jugs"] * 5


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A tokenizer.model of 300 pieces as those of LLaMA 1 and 2 are made."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, model_type="bpe", vocab_size=300, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="session")
def tiktoken_model() -> bytes:
    """A tokenizer.model as Llama 3's is made, of 300 ranks; with its special tokens there are 556 ids."""
    ranks = [bytes([byte]) for byte in range(256)]
    for word in TEXT[0].split():
        for n in range(2, len(word) + 1):
            if word[:n].encode() not in ranks:
                ranks.append(word[:n].encode())
    ranks += [b" " * n for n in range(2, 100)]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks[:300]))


@pytest.fixture(scope="session")
def wide_weights() -> Weights:
    """Of two layers, in rows that K types divide. Not to be changed."""
    return weights_of_wide()


@pytest.fixture(scope="session")
def wide_gguf(wide_weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("wide") / "wide.gguf", wide_weights)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
