"""Vocabulary files: the real ones against the libraries that read them, and every kind of damage."""

from __future__ import annotations

import base64
import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from tiktoken.load import load_tiktoken_bpe
from tiny_llamas import SHARED

from llamatools.checkpoint import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED
from llamatools.errors import FormatError, LlamatoolsError, UnsupportedError
from llamatools.metadata import Kind, Value, array, string, strings, u32
from llamatools.tokenizers import pad_vocab, read_tokenizer, with_instruct
from llamatools.tokenizers.gguf_keys import from_metadata, to_metadata
from llamatools.tokenizers.sentencepiece import read_sentencepiece
from llamatools.tokenizers.tiktoken import read_tiktoken, spelled

VOCABULARIES = SHARED / "data" / "tokenizers"
LLAMA_2, LLAMA_3 = VOCABULARIES / "llama2.model", VOCABULARIES / "llama3.tiktoken"
needs_vocabularies = pytest.mark.skipif(not VOCABULARIES.exists(), reason="needs ../shared/data/tokenizers")


def check_against_sentencepiece(data: bytes) -> None:
    ours, oracle = read_sentencepiece(data), SentencePieceProcessor(model_proto=data)
    ids = range(oracle.get_piece_size())
    assert list(ours.tokens) == [oracle.id_to_piece(i) for i in ids]
    assert ours.scores is not None
    assert ours.scores.tolist() == [np.float32(oracle.get_score(i)) for i in ids]
    kinds = (
        (oracle.is_unknown, UNKNOWN),
        (oracle.is_control, CONTROL),
        (oracle.is_byte, BYTE),
        (oracle.is_unused, UNUSED),
    )
    assert ours.types.tolist() == [next((kind for is_, kind in kinds if is_(i)), NORMAL) for i in ids]
    roles = {"unknown": oracle.unk_id(), "bos": oracle.bos_id(), "eos": oracle.eos_id(), "padding": oracle.pad_id()}
    assert ours.special == {role: id_ for role, id_ in roles.items() if id_ >= 0}


def test_a_small_sentencepiece_model(sentencepiece_model: bytes) -> None:
    check_against_sentencepiece(sentencepiece_model)


@needs_vocabularies
def test_llama_2() -> None:
    check_against_sentencepiece(LLAMA_2.read_bytes())
    tokenizer = read_tokenizer(LLAMA_2)
    assert (tokenizer.model, tokenizer.pre, len(tokenizer.tokens)) == ("llama", "default", 32000)
    assert tokenizer.add_space_prefix
    assert with_instruct(tokenizer) == tokenizer


@needs_vocabularies
@pytest.mark.parametrize("era", ["3", "3.1"])
def test_llama_3(era: str) -> None:
    tokenizer = read_tokenizer(LLAMA_3, era=era)
    ranks = load_tiktoken_bpe(str(LLAMA_3))
    assert len(tokenizer.tokens) == 128256
    assert len(tokenizer.merges) == 280147
    for token, rank in ranks.items():
        assert tokenizer.tokens[rank] == spelled(token)
    assert tokenizer.types[:128000].tolist() == [NORMAL] * 128000
    assert tokenizer.types[128000:].tolist() == [CONTROL] * 256
    assert len(set(tokenizer.tokens)) == 128256
    texts = tokenizer.tokens[128000:128012]
    later = era == "3.1"
    assert texts[0:2] == ["<|begin_of_text|>", "<|end_of_text|>"]
    assert texts[4] == ("<|finetune_right_pad_id|>" if later else "<|reserved_special_token_2|>")
    assert texts[6:8] == ["<|start_header_id|>", "<|end_header_id|>"]
    assert texts[8:10] == ["<|eom_id|>" if later else "<|reserved_special_token_4|>", "<|eot_id|>"]
    assert tokenizer.tokens[-1] == f"<|reserved_special_token_{247 if later else 250}|>"
    special = {"bos": 128000, "eos": 128001, "eot": 128009}
    assert tokenizer.special == (special | {"eom": 128008, "padding": 128004} if later else special)
    assert with_instruct(tokenizer).special["eos"] == 128009


def test_bytes_are_spelled_as_gpt2_does() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert [spelled(bytes([byte])) for byte in range(256)] == [bytes_to_unicode()[byte] for byte in range(256)]


def message(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2, len(value)]) + value


def with_last(model: bytes, number: int, value: bytes) -> bytes:
    """A protobuf message in which a later field of the same number joins or replaces the earlier."""
    return model + message(number, value)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda m: b"", FormatError, "no pieces in it. It is no SentencePiece model"),
        (lambda m: m[:-3], FormatError, "It is truncated, or no SentencePiece model"),
        (lambda m: m + b"\x0a", FormatError, "a number is cut off at byte"),
        (lambda m: m + b"\x0b", FormatError, "wire type 3 of field 1"),
        (lambda m: b"\x0a\x05ab", FormatError, "the model: field 1 needs bytes 2 to 7 of 4. It is truncated, or no"),
        (lambda m: m + b"\x08" + b"\xff" * 11, FormatError, "a number of over 10 bytes"),
        (lambda m: m + b"\x08\x01", FormatError, "piece 300: a number where a message is required"),
        (lambda m: m + message(1, b""), FormatError, "piece 300: a text of 0 bytes, where 1 to 1024 are allowed"),
        (lambda m: m + message(1, b"\x0a\x01a\x18\x07"), FormatError, "piece 300: type 7, where 1 to 6 are known"),
        (lambda m: m + message(1, b"\x0a\x01\xff"), FormatError, "piece 300: its text is not UTF-8 at byte 0"),
        (lambda m: with_last(m, 2, b"\x18\x01"), UnsupportedError, "model_type is 1, but LLaMA's tokenizers have 2"),
        (lambda m: with_last(m, 2, b"\x18\x02"), UnsupportedError, "byte_fallback is 0, but LLaMA's tokenizers have 1"),
        (lambda m: with_last(m, 3, b"\x20\x01"), UnsupportedError, "remove_extra_whitespaces is 1, but LLaMA's"),
        (lambda m: with_last(m, 3, b"\x20\x00\x12\x01x"), UnsupportedError, "it normalizes text by a table"),
        (
            lambda m: with_last(m, 2, b"\x18\x02\x98\x02\x01\xc8\x02\xac\x02"),
            FormatError,
            "id of 'bos': 300, but there are 300 pieces",
        ),
    ],
)
def test_bad_sentencepiece_models(sentencepiece_model: bytes, change: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        read_sentencepiece(change(sentencepiece_model))


def test_too_many_pieces() -> None:
    piece = message(1, b"\x0a\x01a\x15" + bytes(4))
    with pytest.raises(FormatError, match="^over 1048576 pieces$"):
        read_sentencepiece(piece * ((1 << 20) + 1))


def lines(model: bytes) -> list[bytes]:
    return model.splitlines()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ls: [*ls, b"zzz"], "line 301: not a token in base64, a space and a rank"),
        (lambda ls: [*ls, b"!!!! 300"], "line 301: not a token in base64, a space and a rank"),
        (lambda ls: [*ls, b"YWI= x"], "line 301: not a token in base64, a space and a rank"),
        (lambda ls: [*ls, b"YWI= 301"], "line 301: rank 301, where 300 should follow"),
        (lambda ls: [*ls, b"YWI= " + b"9" * 5000], "line 301: rank 999999999, where 300 should follow"),
        (lambda ls: [*ls, b"YQ== 300"], "line 301: the token of line 98 again"),
        (lambda ls: [*ls, base64.b64encode(b"x" * 1025) + b" 300"], "line 301: a token of 1025 bytes, where 1024 are"),
        (lambda ls: ls[:200], "200 of the 256 single bytes are tokens; byte 200 is not. The file is truncated"),
        (lambda ls: [b"YQ== 0"] * (1 << 20) + [b""] * 9, "1048584 lines, where 1048576 tokens are allowed"),
    ],
)
def test_bad_tiktoken_files(tiktoken_model: bytes, change: Any, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        read_tiktoken(b"\n".join(change(lines(tiktoken_model))))


def test_only_our_errors_escape(tmp_path: Path, sentencepiece_model: bytes, tiktoken_model: bytes) -> None:
    """Both kinds of files, cut at every byte and with random bytes changed."""
    draw = random.Random(0)
    path = tmp_path / "tokenizer.model"
    for model in (sentencepiece_model[:900], tiktoken_model[:900], sentencepiece_model, tiktoken_model):
        cuts = [model[:n] for n in range(min(len(model), 900))]
        damaged = []
        for _ in range(300):
            changed = bytearray(model)
            for _ in range(draw.randint(1, 4)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            damaged.append(bytes(changed))
        for data in cuts + damaged:
            path.write_bytes(data)
            with suppress(LlamatoolsError):
                read_tokenizer(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n", "git-lfs"),
        (b"", "empty"),
        (bytes(100), "zero"),
    ],
)
def test_impostors(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"tokenizer.model: .*(?i:{said})"):
        read_tokenizer(path)


def test_a_file_too_large(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(FormatError, match="over 67108864 bytes, where a vocabulary has a few million"):
        read_tokenizer(path)


def test_equal_texts_are_refused(tmp_path: Path, sentencepiece_model: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(
        sentencepiece_model + message(1, b"\x0a\x05<0x41"[:2] + b"<0x41>"[:5]) + message(1, b"\x0a\x03</s")
    )
    read_tokenizer(path)
    path.write_bytes(sentencepiece_model + message(1, b"\x0a\x04</s>"))
    with pytest.raises(FormatError, match="2 tokens have the text '</s>', where each must have its own"):
        read_tokenizer(path)


def test_padding_as_llama_cpp_names_it(sentencepiece_model: bytes, tiktoken_model: bytes) -> None:
    padded = pad_vocab(read_sentencepiece(sentencepiece_model), 302)
    assert padded.tokens[300:] == ["[PAD300]", "[PAD301]"]
    assert padded.types[300:].tolist() == [UNUSED] * 2
    assert padded.scores is not None
    assert padded.scores[300:].tolist() == [-10000.0] * 2
    assert pad_vocab(read_tiktoken(tiktoken_model), 557).scores is None


def test_infill_tokens_are_found_by_text(sentencepiece_model: bytes) -> None:
    pieces = b"".join(message(1, message(1, text.encode())) for text in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"))
    special = read_sentencepiece(sentencepiece_model + pieces).special
    assert {role: special[role] for role in ("fim_pre", "fim_suf", "fim_mid", "eot")} == {
        "fim_pre": 300, "fim_suf": 301, "fim_mid": 302, "eot": 303,
    }  # fmt: skip


def test_keys_round_trip(sentencepiece_model: bytes, tiktoken_model: bytes) -> None:
    for tokenizer in (read_sentencepiece(sentencepiece_model), read_tiktoken(tiktoken_model, era="3.1")):
        kept = from_metadata(to_metadata(tokenizer))
        assert kept is not None
        assert (kept.model, kept.pre, list(kept.tokens)) == (tokenizer.model, tokenizer.pre, list(tokenizer.tokens))
        assert list(kept.merges) == list(tokenizer.merges)
        assert kept.types.tolist() == tokenizer.types.tolist()
        assert dict(tokenizer.special).items() <= dict(kept.special).items()
        assert kept.add_bos


def test_keys_are_those_of_gguf(sentencepiece_model: bytes, tiktoken_model: bytes) -> None:
    known = {value for name, value in vars(gguf.Keys.Tokenizer).items() if not name.startswith("_")}
    for tokenizer in (read_sentencepiece(sentencepiece_model), read_tiktoken(tiktoken_model, era="3.1")):
        assert set(to_metadata(tokenizer)) <= known


BASE = {
    "tokenizer.ggml.model": string("llama"),
    "tokenizer.ggml.tokens": strings(["a", "b", "c"]),
    "tokenizer.ggml.scores": array(Kind.FLOAT32, np.zeros(3, np.float32)),
}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tokens", None, "key 'tokenizer.ggml.tokens': required, but missing"),
        ("tokens", u32(3), "key 'tokenizer.ggml.tokens': uint32 where an array of string is required"),
        ("tokens", array(Kind.INT32, np.zeros(3, np.int32)), "where an array of string is required"),
        ("model", u32(3), "key 'tokenizer.ggml.model': uint32 where string is required"),
        ("scores", array(Kind.FLOAT32, np.zeros(2, np.float32)), "key 'tokenizer.ggml.scores': 2 items for 3 tokens"),
        ("token_type", array(Kind.INT32, np.zeros(4, np.int32)), "'tokenizer.ggml.token_type': 4 items for 3 tokens"),
        ("bos_token_id", u32(3), "key 'tokenizer.ggml.bos_token_id': id 3, but there are 3 tokens"),
        ("bos_token_id", Value(Kind.INT32, 1), "int32 where uint32 is required"),
        ("add_bos_token", u32(1), "key 'tokenizer.ggml.add_bos_token': uint32 where bool is required"),
    ],
)
def test_bad_keys(key: str, value: Value | None, said: str) -> None:
    metadata = {**BASE, f"tokenizer.ggml.{key}": value}
    with pytest.raises(FormatError, match=said):
        from_metadata({key: value for key, value in metadata.items() if value is not None})


def test_missing_keys_mean_what_llama_cpp_takes() -> None:
    tokenizer = from_metadata(BASE)
    assert tokenizer is not None
    assert tokenizer.special == {"bos": 1, "eos": 2, "unknown": 0}
    assert tokenizer.add_bos
    assert tokenizer.types.tolist() == [1, 1, 1]
    assert from_metadata({}) is None
    assert from_metadata({"tokenizer.ggml.model": string("no_vocab")}) is None
    unset = from_metadata({**BASE, "tokenizer.ggml.padding_token_id": u32(0xFFFFFFFF)})
    assert unset is not None
    assert "padding" not in unset.special


def test_merges_come_in_the_order_in_which_tiktoken_merges() -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"abc"]
    data = b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens))
    assert list(read_tiktoken(data).merges) == ["a b", "b c", "a bc", "ab c"]


def test_floats_of_pieces_are_little_endian(sentencepiece_model: bytes) -> None:
    piece = message(1, b"\x0a\x01\x7f" + b"\x15" + struct.pack("<f", -1.5))
    scores = read_sentencepiece(sentencepiece_model + piece).scores
    assert scores is not None
    assert scores[300] == -1.5
