"""Every finding, planted in a file that is otherwise sound, with its exact line."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import I32, STRING, U8, U32, U64, Tensor, array, build, key, scalar
from llama_files import data_start, llama, written
from same_models import state_of, write_hf
from test_gguf_split import shard
from test_impostors import POINTER
from test_safetensors import file_of

import llamatools
from llamatools.check import SEVERITIES
from llamatools.errors import UsageError

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}  # a tensor of safetensors
START = data_start()
END = START + 42_368
WHOLE = "The data is whole: `llamatools convert` lays it out anew"
ANEW = "Make or download the file again"
GONE = "The file is probably truncated"
START_MORE = data_start({"more_tensors": [Tensor("rope_freqs.weight", 24, (5,)), Tensor("blk.0.attn_q.bias")]})


def norm_at(offset: int) -> dict[str, Tensor]:
    """The file's last tensor, of 128 bytes, at an offset of its own; it belongs at 42,240."""
    return {"output_norm.weight": Tensor("output_norm.weight", offset=offset)}


def swapped() -> dict[str, Tensor]:
    """attn_k and attn_v, of 2048 bytes each, listed in the order opposite to their data's."""
    return {
        "blk.0.attn_k.weight": Tensor("blk.0.attn_k.weight", ne=(32, 16), offset=11392),
        "blk.0.attn_v.weight": Tensor("blk.0.attn_v.weight", ne=(32, 16), offset=9344),
    }


def shifted(data: bytes, n: int) -> bytes:
    """The file with the zeros of its last tensors' data."""
    return data[: len(data) - n] + bytes(n)


# What is planted: the file, and all that is found in it, errors first.
PLANTED: dict[str, tuple[bytes, list[str]]] = {
    "nothing": (llama(), []),
    "nothing, in an importance matrix": (
        build([key("general.type", scalar(STRING, "imatrix"))], [Tensor("blk.0.attn_q.weight.in_sum2")]),
        [],
    ),
    "an empty file": (b"", ["empty: the file is empty. Download it again"]),
    "a web page": (
        b"<!DOCTYPE html><html>",
        [
            "web-page: a web page of 21 bytes, not a model. The download met a login or error page; download it again "
            "with access to it"
        ],
    ),
    "a pointer": (
        POINTER,
        [
            f"lfs-pointer: a git-lfs pointer of {len(POINTER)} bytes that stands for a file of 12345 bytes. Fetch the "
            "file itself with `git lfs pull`"
        ],
    ),
    "a header that was never written, as an interrupted llama-quantize leaves it": (
        bytes(START) + llama()[START:],
        [
            "zero-header: its first 512 bytes are zeros, as an interrupted write leaves them. Copy or download it "
            "again"
        ],
    ),
    "tensors that were never written": (
        shifted(llama(), 8192 + 128 + 100),
        [
            f"zero-tail: tensor 'blk.0.ffn_down.weight': bytes {END - 8420} to {END} are zeros, and with them all of 2 "
            "tensors, as an interrupted write leaves them. Copy or download it again"
        ],
    ),
    "rows that were never written": (
        shifted(llama(), 8192),
        [
            "zero-end: tensor 'output_norm.weight': the last 8192 bytes of the file's data are zeros: rows that "
            "nothing uses, or a write that was interrupted"
        ],
    ),
    "a value of an unknown type": (
        llama(more_keys=[key("odd", struct.pack("<II", 13, 0))], data=False, n_tensors=0)[:-1],
        ["damaged: key 'odd': value type 13, where 0 to 12 are known"],
    ),
    "data cut off": (
        llama(cut=8192 + 128 + 100),
        [
            f"truncated: tensor 'blk.0.ffn_up.weight': its data is bytes {END - 16512} to {END - 8320}, but the file "
            f"ends at {END - 8420}: 8420 bytes of 3 tensors are missing. {GONE}"
        ],
    ),
    "a header cut off": (
        llama()[:300],
        [
            "truncated: key 'llama.attention.head_count_kv': bytes 300 to 304 are needed, but the file ends at 300. "
            f"{GONE}"
        ],
    ),
    "an alignment that is none": (
        llama({"general.alignment": scalar(U32, 24)}),
        ["alignment-value: key 'general.alignment': 24 is no power of two"],
    ),
    "a file for 32 that says 4096, as llama-quantize writes it": (
        llama({"general.alignment": scalar(U32, 4096)}),
        [
            "alignment-mismatch: key 'general.alignment': the tensors' offsets are the running sum for 32, but "
            f"general.alignment says 4096. {WHOLE}"
        ],
    ),
    "a file for 4096 that does not say so, as gguf-py writes a set's later files": (
        llama(alignment=4096),
        [
            "alignment-mismatch: key 'general.alignment': the tensors' offsets are the running sum for 4096, but "
            f"general.alignment is not stated, which means 32. {WHOLE}"
        ],
    ),
    "a hole": (
        llama(tensors=norm_at(42_240 + 32)) + bytes(range(32)),
        [
            f"hole: tensor 'output_norm.weight': its data begin at byte {END - 96}, but tensor 'blk.0.ffn_down.weight' "
            f"ends at {END - 128}, which padded to 32 is {END - 128}: a hole of 32 bytes. {WHOLE}"
        ],
    ),
    "a hole in a file that is longer than that explains": (
        llama(tensors=norm_at(42_240 + 32)) + bytes(range(132)),
        [
            f"hole: tensor 'output_norm.weight': its data begin at byte {END - 96}, but tensor 'blk.0.ffn_down.weight' "
            f"ends at {END - 128}, which padded to 32 is {END - 128}: a hole of 32 bytes. {ANEW}",
            f"unplaced: its tensors' data would be bytes {START} to {END + 32}, but the file ends at {END + 132}: "
            f"nothing tells where they begin. {ANEW}",
            f"trailing: 100 bytes follow the last tensor, which ends at byte {END + 32}",
        ],
    ),
    "an overlap": (
        llama(tensors=norm_at(42_240 - 32), cut=32),
        [
            f"overlap: tensor 'output_norm.weight': its data begin at byte {END - 160}, but tensor "
            f"'blk.0.ffn_down.weight' ends at {END - 128}: they overlap by 32 bytes. The file is damaged"
        ],
    ),
    "padding left out, of a tensor of 5 bytes": (
        llama(more_tensors=[Tensor("rope_freqs.weight", 24, (5,)), Tensor("blk.0.attn_q.bias", offset=42_388)]),
        [
            f"padding: tensor 'blk.0.attn_q.bias': its data begin at byte {START_MORE + 42_388}, but tensor "
            f"'rope_freqs.weight' ends at {START_MORE + 42_373}, which padded to 32 is {START_MORE + 42_400}. {WHOLE}",
            "shape-mismatch: tensor 'rope_freqs.weight': [5], where the hyperparameters ask for [4]",
        ],
    ),
    "tensors in another order": (
        llama(tensors=swapped()),
        [
            f"order: tensor 'blk.0.attn_k.weight': its data begin at byte {START + 11392}, but the tensors listed "
            f"before it end at {START + 9344}: they do not lie in the order of the list. {WHOLE}"
        ],
    ),
    "bytes behind the last tensor": (
        llama() + bytes(100),
        [f"trailing: 100 bytes follow the last tensor, which ends at byte {END}"],
    ),
    "no padding behind the last tensor": (
        llama(more_tensors=[Tensor("rope_freqs.weight", ne=(4,))], cut=10),
        ["unpadded: the padding behind the last tensor is 6 bytes, where 16 are usual"],
    ),
    "a name of 64 bytes": (
        llama(more_tensors=[Tensor("n" * 64)]),
        [
            "tensor-name: tensor 11: a name of 64 bytes, where 63 are allowed",
            f"tensor-unknown: 1 tensor is none of a LLaMA of 1 layers, the first is '{'n' * 64}'; llama.cpp refuses "
            "such files",
        ],
    ),
    "a tensor that stands twice": (
        llama(more_tensors=[Tensor("output_norm.weight")]),
        ["tensor-twice: tensor 'output_norm.weight': two tensors have this name"],
    ),
    "a key without a name": (
        llama(more_keys=[key("", scalar(U8, 1))]),
        ["key-name: key 12: it has no name"],
    ),
    "a key that stands twice": (
        llama(more_keys=[key("llama.block_count", scalar(U32, 2))]),
        ["key-twice: key 'llama.block_count': it stands twice in the file"],
    ),
    "keys of the wrong type": (
        llama(
            {
                "llama.block_count": scalar(U64, 1),
                "general.name": scalar(U8, 1),
                "tokenizer.ggml.scores": scalar(U8, 1),
            }
        ),
        [
            "key-type: key 'llama.block_count': uint64 where uint32 is required",
            "key-type: key 'tokenizer.ggml.scores': uint8 where an array of float32 is required",
            "key-type: key 'general.name': uint8 where string is required",
        ],
    ),
    "an alignment of the wrong type": (
        llama({"general.alignment": scalar(I32, 32)}),
        ["key-type: key 'general.alignment': int32 where uint32 is required"],
    ),
    "keys that are missing": (
        llama({"llama.context_length": None, "llama.attention.layer_norm_rms_epsilon": None}),
        [
            "key-missing: key 'llama.attention.layer_norm_rms_epsilon': required, but missing",
            "key-missing: key 'llama.context_length': required, but missing",
        ],
    ),
    "no architecture": (
        llama({"general.architecture": None}),
        ["key-missing: key 'general.architecture': required, but missing"],
    ),
    "no tokens": (
        llama({"tokenizer.ggml.tokens": None, "llama.vocab_size": scalar(U32, 40)}),
        ["key-missing: key 'tokenizer.ggml.tokens': required, but missing"],
    ),
    "names that steer a terminal": (
        llama(more_keys=[key("red\x1b[31m", scalar(U8, 1))], more_tensors=[Tensor(b"blk.0.ffn_up.\xff")]),
        [
            r"hostile-name: key 'red\x1b[31m': its name has characters that steer a terminal, cannot be seen, or are "
            "no UTF-8",
            r"hostile-name: tensor 'blk.0.ffn_up.\udcff': its name has characters that steer a terminal, cannot be "
            "seen, or are no UTF-8",
            r"tensor-unknown: 1 tensor is none of a LLaMA of 1 layers, the first is 'blk.0.ffn_up.\udcff'; llama.cpp "
            "refuses such files",
        ],
    ),
    "weights of a type that ggml gave up": (
        llama(tensors={"blk.0.attn_q.weight": Tensor("blk.0.attn_q.weight", 4, (32, 32))}),
        ["dtype: tensor 'blk.0.attn_q.weight': weights of ggml's type 4, which ggml has given up"],
    ),
    "rows that are no whole blocks": (
        llama(tensors={"blk.0.attn_q.weight": Tensor("blk.0.attn_q.weight", 12, (32, 32))}),
        ["shape: tensor 'blk.0.attn_q.weight': rows of 32 weights do not divide into Q4_K blocks of 256"],
    ),
    "heads that cannot share": (
        llama({"llama.attention.head_count_kv": scalar(U32, 3)}),
        ["hparams: key 'llama.attention.head_count_kv': 4 heads cannot share 3 heads of keys and values equally"],
    ),
    "no heads": (
        llama({"llama.attention.head_count": scalar(U32, 0)}),
        ["hparams: key 'llama.attention.head_count': 0 is out of range"],
    ),
    "billions of layers": (
        llama({"llama.block_count": scalar(U32, 2**32 - 1)}),
        ["hparams: key 'llama.block_count': 4294967295 layers, where llama.cpp takes 512 at most"],
    ),
    "shapes that the hyperparameters contradict": (
        llama({"llama.feed_forward_length": scalar(U32, 96)}),
        [
            f"shape-mismatch: tensor 'blk.0.ffn_{name}.weight': {shape}, where the hyperparameters ask for {wanted}"
            for name, shape, wanted in (
                ("gate", [64, 32], [96, 32]), ("up", [64, 32], [96, 32]), ("down", [32, 64], [32, 96])
            )
        ],
    ),
    "tensors that are missing": (
        llama({"llama.block_count": scalar(U32, 2)}),
        [
            "tensor-missing: 9 of the 21 tensors of a LLaMA of 2 layers are missing, the first is "
            "'blk.1.attn_norm.weight'"
        ],
    ),
    "tensors that a LLaMA does not have": (
        llama(more_tensors=[Tensor("blk.1.attn_q.weight", ne=(32, 32)), Tensor("checksum")]),
        [
            "tensor-unknown: 2 tensors are none of a LLaMA of 1 layers, the first is 'blk.1.attn_q.weight'; llama.cpp "
            "refuses such files"
        ],
    ),
    "a vocabulary of another model": (
        llama(
            {
                "tokenizer.ggml.tokens": array(STRING, [f"{n}" for n in range(41)]),
                "tokenizer.ggml.token_type": array(I32, [1] * 41),
                "llama.vocab_size": scalar(U32, 40),
            }
        ),
        [
            "vocabulary: key 'tokenizer.ggml.scores': 40 items for 41 tokens",
            "vocabulary: key 'llama.vocab_size': 40 where the vocabulary has 41 tokens",
            "vocabulary: tensor 'token_embd.weight': 40 rows for a vocabulary of 41 tokens. The vocabulary is of "
            "another model",
        ],
    ),
    "super-blocks of 64": (  # 16 of 38 bytes, where today there would be 4 of 144
        build([], [Tensor("a", 12, (256, 4), offset=0), Tensor("b", 0, (8,), offset=608)]) + bytes(32),
        [
            "dtype: tensor 'a': its blocks are of 64 weights, as llama.cpp built with LLAMA_QKK_64 wrote them until "
            "2024, where 256 are read. Make or download the file again",
            "key-missing: key 'general.architecture': required, but missing",
        ],
    ),
    "tokens of one text": (
        llama({"tokenizer.ggml.tokens": array(STRING, ["a", "a", *(f"a long text {n % 37}" for n in range(38))])}),
        [
            "vocabulary: key 'tokenizer.ggml.tokens': 40 tokens have 38 texts, where each must have its own: llama.cpp "
            "ends the process"
        ],
    ),
    "bytes without a number": (
        llama({
            "tokenizer.ggml.tokens": array(STRING, ["<0x0a>", "<0x-1>", *(f"{n}" for n in range(38))]),
            "tokenizer.ggml.token_type": array(I32, [6, 6] + [1] * 38),
        }),
        [
            "vocabulary: key 'tokenizer.ggml.tokens': token 1 stands for a byte, but its text '<0x-1>' names none as "
            "<0x00> to <0xFF> do"
        ],
    ),
    "special ids out of range": (
        llama({"tokenizer.ggml.bos_token_id": scalar(U32, 40), "tokenizer.ggml.eos_token_id": scalar(U32, 41)}),
        [
            "special-id: key 'tokenizer.ggml.bos_token_id': id 40, but there are 40 tokens",
            "special-id: key 'tokenizer.ggml.eos_token_id': id 41, but there are 40 tokens",
        ],
    ),
}  # fmt: skip


def found_in(path: Path, **options: Any) -> list[str]:
    return [f"{finding.code}: {finding}" for finding in llamatools.findings(llamatools.inspect(path), **options)]


@pytest.mark.parametrize("name", PLANTED)
def test_planted(name: str, tmp_path: Path) -> None:
    data, expected = PLANTED[name]
    assert found_in(written(tmp_path / "model.gguf", data)) == expected


# Files of other formats, with what is found in them.
OTHERS: dict[str, tuple[Any, bytes, list[str]]] = {
    "a hole": (
        {"a": A, "b": A | {"data_offsets": [12, 20]}},
        bytes(range(20)),
        ["hole: tensor 'b': its data begin at byte 212, but tensor 'a' ends at 208: a hole"],
    ),
    "an overlap, and bytes left over": (
        {"a": A, "b": A | {"data_offsets": [4, 12]}},
        bytes(range(13)),
        [
            "overlap: tensor 'b': its data begin at byte 204, but tensor 'a' ends at 208: an overlap",
            "hole: tensor 'b' ends at byte 212, but the file at 213: bytes that belong to no tensor",
        ],
    ),
    "truncated": (
        {"a": A, "b": A | {"data_offsets": [8, 16]}},
        bytes(range(9)),
        [f"truncated: tensor 'b': its data is bytes 208 to 216, but the file ends at 209. {GONE}"],
    ),
    "numbers at odd bytes": (
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": A | {"data_offsets": [1, 9]}},
        bytes(range(9)),
        [
            "not-in-place: tensor 'b': its numbers of 4 bytes begin at byte 201, so that they cannot be used without "
            "a copy"
        ],
    ),
    "no JSON": (
        b'{"a":',
        b"",
        ["damaged: header: it is no JSON (Expecting value: line 1 column 6 (char 5)). The file is damaged"],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_planted_in_safetensors(name: str, tmp_path: Path) -> None:
    header, data, expected = OTHERS[name]
    assert found_in(file_of(tmp_path / "model.safetensors", header, data)) == expected


# What is done to the config.json of a Hugging Face folder, and what is found.
FOLDERS: dict[str, tuple[Callable[[dict[str, Any]], object], list[str]]] = {
    "nothing": (lambda config: None, []),
    "a config of another model": (
        lambda config: config.update(intermediate_size=100, num_hidden_layers=4),
        [
            *(
                f"shape-mismatch: tensor 'model.layers.{n}.mlp.{name}.weight': {has}, where config.json asks for "
                f"{asked}"
                for n in range(3)
                for name, has, asked in (
                    ("down_proj", [64, 96], [64, 100]),
                    ("gate_proj", [96, 64], [100, 64]),
                    ("up_proj", [96, 64], [100, 64]),
                )
            ),
            "tensor-missing: 9 of the 39 tensors of a LLaMA of 4 layers are missing, the first is "
            "'blk.3.attn_norm.weight' in GGUF's names",
        ],
    ),
    "rows of the embedding": (
        lambda config: config.update(vocab_size=301),
        [
            f"shape-mismatch: tensor '{name}.weight': [300, 64], where config.json asks for [301, 64]"
            for name in ("lm_head", "model.embed_tokens")
        ],
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_planted_in_a_hugging_face_folder(name: str, tmp_path: Path) -> None:
    damage, expected = FOLDERS[name]
    folder = write_hf(tmp_path / "hf", state_of())
    config = json.loads((folder / "config.json").read_text())
    damage(config)
    (folder / "config.json").write_text(json.dumps(config))
    assert sorted(found_in(folder)) == sorted(expected)


# A set of two files: what is done to its second, and what is found.
SETS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda second: None, []),
    "a file is missing": (
        Path.unlink,
        ["shard-missing: 1 of its 2 shards is missing: m-00002-of-00002.gguf. Put all shards into one folder"],
    ),
    "a file that was renamed": (
        lambda second: second.write_bytes(shard(0)),
        ["shard-name: key 'split.no': 0, where its name says 1. It was renamed"],
    ),
    "a file of another model": (
        lambda second: second.write_bytes(shard(1, more=[key("general.name", scalar(STRING, "other"))])),
        ["shard-alien: key 'general.name': not what m-00001-of-00002.gguf says. It is a shard of another model"],
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_planted_in_sets(name: str, tmp_path: Path) -> None:
    damage, expected = SETS[name]
    first = written(tmp_path / "m-00001-of-00002.gguf", shard(0, more=[key("general.name", scalar(STRING, "mine"))]))
    damage(written(tmp_path / "m-00002-of-00002.gguf", shard(1)))
    assert [line for line in found_in(first) if line.startswith("shard-")] == expected


def test_a_truncated_pth(tmp_path: Path) -> None:
    data = (Path(__file__).parents[1] / "fixtures" / "tiny-llama" / "consolidated.00.pth").read_bytes()
    path = written(tmp_path / "cut.pth", data[:-1000])
    layout = llamatools.inspect(path)
    assert (layout.format, layout.size, layout.tensors) == ("torch zip", len(data) - 1000, ())
    assert [finding.code for finding in llamatools.findings(layout)] == ["damaged"]


def test_alignment_is_asserted(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", llama())
    assert found_in(path, align=32) == []
    assert found_in(path, align=4096) == [
        f"misaligned: tensor 'token_embd.weight': 11 of 11 tensors do not begin at a multiple of 4096; this one begins "
        f"at byte {START}. `llamatools convert --align 4096` lays it out so"
    ]
    with pytest.raises(UsageError, match="--align: 24 is no power of two"):
        found_in(path, align=24)


def test_places_and_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "cut.gguf", llama(cut=100))
    (finding,) = llamatools.findings(llamatools.inspect(path))
    assert (finding.severity, finding.file, finding.where) == ("error", str(path), "tensor 'output_norm.weight'")
    assert finding.span == (END - 100, END)


# ---- the table and the page ----


def test_every_code_is_planted_and_explained() -> None:
    lines = [line for _, found in PLANTED.values() for line in found]
    lines += [line for *_, found in OTHERS.values() for line in found]
    lines += [line for _, found in SETS.values() for line in found]
    elsewhere = {"misaligned", "nan", "infinite", "huge", "zero-tensor", "not-scanned"}  # in the tests of their own
    elsewhere |= {"digest", "digest-stale", "digest-lost", "unlike-source", "not-in-source", "not-in-file", "unproven"}
    assert {line.split(": ")[0] for line in lines} | elsewhere == SEVERITIES.keys()
    page = (Path(__file__).parents[1] / "docs" / "reference" / "findings.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \| (\w+) \| .+ \| .+ \|$", page, re.MULTILINE)
    assert dict(rows) == SEVERITIES
    assert len(rows) == len(SEVERITIES)
