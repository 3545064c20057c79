"""What tests share: vocabularies, made by the libraries that Meta used, and models to quantize."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import sentencepiece
from quantizing import TINY_LLAMA, WIDE, write_wide
from tiny_llamas import Weights, random_weights

import llamatools
from llamatools import MetaOptions, Overrides
from llamatools.dtypes import BF16

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
    """Of WIDE, each a bfloat16 number. Not to be changed."""
    drawn = random_weights(WIDE)
    return {
        name: BF16.decode(BF16.encode(array.reshape(-1, array.shape[-1]), None)).reshape(array.shape)
        for name, array in drawn.items()
    }


@pytest.fixture(scope="session")
def wide_gguf(wide_weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("wide") / "wide.gguf", wide_weights)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    llamatools.convert(TINY_LLAMA, path, options=MetaOptions(overrides=Overrides(context=1024)), name="Tiny LLaMA")
    return path
