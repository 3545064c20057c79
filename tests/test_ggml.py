"""ggml, ggmf and ggjt files: a real vocabulary, files of an independent writer, and damage."""

from __future__ import annotations

import random
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from ggml_files import BLOCKS, BY_64, HEADS, Tensor, build, llama
from sentencepiece import SentencePieceProcessor
from tiny_llamas import SHARED

import llamatools
from llamatools import names
from llamatools.check import SEVERITIES
from llamatools.dtypes import BY_NAME
from llamatools.errors import FormatError, LlamatoolsError, UnsupportedError
from llamatools.formats.ggml import read_ggml

REAL = SHARED / "data" / "legacy" / "ggjt-v1-vocab.bin"
LLAMA_2 = SHARED / "data" / "tokenizers" / "llama2.model"
TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "Q4_2", 5: "Q4_3", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
         10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}  # fmt: skip


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data")
def test_a_real_vocabulary_is_restored_to_what_sentencepiece_reads() -> None:
    layout = llamatools.inspect(REAL)
    assert (layout.format, layout.size, layout.tensors) == ("ggjt v1", 432_610, ())
    header = {key: value.data for key, value in layout.metadata.items() if key not in ("tokens", "scores")}
    assert header == {
        "n_vocab": 32000, "n_embd": 4096, "n_mult": 256, "n_head": 32, "n_layer": 32, "n_rot": 128, "ftype": 1,
    }  # fmt: skip
    sp = SentencePieceProcessor(model_file=str(LLAMA_2))
    tokenizer = layout.tokenizer
    assert tokenizer is not None
    assert tokenizer.scores is not None
    assert list(tokenizer.tokens) == [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    assert tokenizer.scores.tolist() == [sp.get_score(i) for i in range(sp.get_piece_size())]
    assert [(t == 2, t == 3, t == 6) for t in tokenizer.types] == [
        (sp.is_unknown(i), sp.is_control(i), sp.is_byte(i)) for i in range(sp.get_piece_size())
    ]
    assert tokenizer.special == {"unknown": sp.unk_id(), "bos": sp.bos_id(), "eos": sp.eos_id()}
    assert ("tensors", "none") in [(note.what, note.value) for note in layout.notes]


@pytest.mark.parametrize("format", HEADS)
def test_every_type_of_every_format(format: str, tmp_path: Path) -> None:
    for type_, (block_size, block_nbytes) in BLOCKS[format].items():
        path, tensors = tmp_path / f"{type_}.bin", llama(type_)
        built = build(format, tensors, ftype=type_)
        path.write_bytes(built.data)
        layout = llamatools.inspect(path)
        assert (layout.format, layout.alignment) == (format, 32 if format.startswith("ggjt") else None)
        assert [(t.name, t.shape, t.offset, t.nbytes) for t in layout.tensors] == [
            (t.name, t.ne[::-1], offset, t.nbytes(format)) for t, offset in zip(tensors, built.offsets, strict=True)
        ]
        assert layout.metadata["ftype"].data == type_
        dtype = layout.tensors[0].dtype
        assert (dtype.block_size, dtype.block_nbytes) == (block_size, block_nbytes)
        assert dtype.name.split()[0] == TYPES[type_]
        # Today's blocks are today's dtype; others have a name of their own and are never taken for today's.
        is_todays = (block_size, block_nbytes) == (BY_NAME.get(TYPES[type_], dtype).block_size, dtype.block_nbytes)
        split_since_v2 = type_ in (6, 7) and format in ("ggmf v1", "ggjt v1")
        if type_ in (4, 5) or split_since_v2 or (type_ in (2, 3, 8) and format != "ggjt v3"):
            assert dtype not in BY_NAME.values()
            assert dtype.decode is None
        else:
            assert is_todays
            assert dtype is BY_NAME[TYPES[type_]]


@pytest.mark.parametrize("format", HEADS)
def test_vocabulary_and_header_as_they_stand_in_the_file(format: str, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    vocabulary = [(b"", 0.0), (b"\xff\x00", -1.5), ("▁ 🐲".encode(), 3e38), (b"x" * 1024, float("-inf"))]
    path.write_bytes(build(format, [], vocabulary).data)
    layout = read_ggml(path)
    tokens = layout.metadata["tokens"].data
    assert [text.encode("utf-8", "surrogateescape") for text in tokens] == [text for text, _ in vocabulary]
    assert layout.tokenizer is None
    notes = {note.what: note.value for note in layout.notes}
    if format == "ggml":
        assert "scores" not in layout.metadata
        assert notes.keys() == {"shape", "tensors", "scores"}
    else:
        scores = np.array([score for _, score in vocabulary], np.float32)
        np.testing.assert_array_equal(layout.metadata["scores"].data, scores)
        assert notes.keys() == {"shape", "tensors", "tokenizer"}
    assert notes["shape"] == "1 layers, dim 256, 8 heads"


def test_rows_of_the_first_weeks_are_said_to_be_open(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(build("ggml", llama(2)).data)
    notes = {note.what: note for note in read_ggml(path).notes}
    assert notes["blocks"].value == "Q4_0 (ggml)"
    assert "rows of Q4_0 until 11 March 2023" in notes["blocks"].reason
    path.write_bytes(build("ggml", llama(1)).data)
    assert "blocks" not in {note.what for note in read_ggml(path).notes}


def test_opened_as_a_checkpoint_with_metas_names(tmp_path: Path) -> None:
    path, tensors = tmp_path / "m.bin", llama(1)
    built = build("ggmf v1", tensors)
    path.write_bytes(built.data)
    checkpoint = llamatools.open(path)
    assert checkpoint.scheme == "meta"
    assert set(checkpoint.tensors) == set(names.meta_names(1))
    for tensor, offset in zip(tensors, built.offsets, strict=True):
        lazy = checkpoint.tensors[str(tensor.name)]
        data = built.data[offset : offset + tensor.nbytes("ggmf v1")]
        assert lazy.read(0, lazy.n_rows).tobytes() == data


def parts(folder: Path) -> list[Path]:
    """A model of dim 512 in two parts, of which each has half of the embedding's columns."""
    paths = [folder / "m.bin", folder / "m.bin.1"]
    for path in paths:
        path.write_bytes(build("ggmf v1", llama(1), dim=512).data)
    return paths


def test_parts_are_one_model(tmp_path: Path) -> None:
    paths = parts(tmp_path)
    for path in paths:
        layout = read_ggml(path)
        assert [file.path for file in layout.files] == paths
        assert [t.file for t in layout.tensors] == [0] * 12 + [1] * 12
        assert [t.offset for t in layout.tensors[:12]] == [t.offset for t in layout.tensors[12:]]
    with pytest.raises(UnsupportedError, match="m.bin: a model in parts of before ggjt can be looked at only"):
        llamatools.open(paths[0])


def test_parts_that_are_missing_or_differ(tmp_path: Path) -> None:
    first, second = parts(tmp_path)
    for data, said in (
        (
            build("ggmf v1", llama(1), dim=512, ftype=2).data,
            "m.bin.1: ftype: not what m.bin says. It is of another m",
        ),
        (build("ggmf v1", llama(0), dim=512).data, "m.bin.1: tensor 'tok_embeddings.weight': not as in m.bin"),
        (build("ggmf v1", [], dim=512).data, "m.bin.1: tensor 'tok_embeddings.weight': not as in m.bin"),
        (build("ggml", llama(1), dim=512).data, "m.bin.1: scores: not what m.bin says"),
    ):
        second.write_bytes(data)
        with pytest.raises(FormatError, match=re.escape(said)):
            read_ggml(first)
    renamed = second.rename(tmp_path / "m.bin.7")  # no part of two is called so
    assert [problem.file for problem in llamatools.inspect(renamed).problems] == [str(renamed)]
    layout = llamatools.inspect(first)
    assert (len(layout.tensors), [problem.code for problem in layout.problems]) == (12, ["shard-missing"])
    with pytest.raises(FormatError, match="m.bin: it is one of 2 parts, of which m.bin.1 is missing. Put all parts in"):
        read_ggml(first)
    first.write_bytes(build("ggmf v1", llama(1), dim=1024).data)
    with pytest.raises(FormatError, match="one of 4 parts, of which m.bin.1, m.bin.2, m.bin.3 are missing"):
        read_ggml(first)


TOKENS = [(b"a", 0.0)]
WITHOUT = [tensor for tensor in llama() if "w3" not in str(tensor.name)]
DAMAGED = "The file is damaged or truncated"

# name: the file, the error, what is said of it
REFUSED: dict[str, tuple[bytes, type[LlamatoolsError], str]] = {
    "another magic": (b"ggla" + bytes(60), FormatError, "no ggml, ggmf or ggjt file: it begins with b'ggla'"),
    "adapter": (struct.pack("<2I", 0x67676C61, 1), UnsupportedError, "a LoRA adapter in llama.cpp's format of 2023"),
    "ggmf version": (build("ggmf v1", [], version=2).data, UnsupportedError, "ggmf version 2. Known are 1"),
    "ggjt version": (build("ggjt v1", [], version=4).data, UnsupportedError, "ggjt version 4. Known are 1, 2, 3"),
    "big-endian": (
        build("ggjt v1", [], byte_order=">").data,
        UnsupportedError,
        "a big-endian ggjt file. Little-endian ones are read",
    ),
    "no layers": (build("ggjt v1", [], n_layers=0).data, FormatError, "header: 0 layers, where 1 to 1024 are allowed"),
    "many layers": (build("ggml", [], n_layers=2**31).data, FormatError, f"header: {2**31} layers, where 1 to 1024"),
    "tokens": (
        build("ggjt v1", [], n_vocab=2**32 - 1).data,
        FormatError,
        f"vocabulary: {2**32 - 1} tokens of 8 bytes or more are announced, but at most 75 bytes can follow. {DAMAGED}",
    ),
    "long token": (
        build("ggml", [], [(b"x" * 1025, 0)]).data,
        FormatError,
        "token 0: a text of 1025 bytes, where 1024 are allowed. The file is damaged, or no LLaMA: other models have",
    ),
    "token cut": (
        build("ggml", [], TOKENS, n_vocab=2).data + b"\x04\0\0\0abc",
        FormatError,
        "token 1: bytes 41 to 45 are needed, but the file ends at 44",
    ),
    "no axes": (
        build("ggml", [Tensor("norm.weight", ne=())], TOKENS).data,
        FormatError,
        "the tensor at byte 37: 0 axes and a name of 11 bytes, where 1 to 2 and 1 to 255 are allowed. The file is dam",
    ),
    "three axes": (build("ggml", [Tensor("norm.weight", ne=(1, 2, 3))]).data, FormatError, "3 axes and a name of 11"),
    "no name": (build("ggml", [Tensor("")]).data, FormatError, "1 axes and a name of 0 bytes"),
    "long name": (build("ggml", [Tensor("n" * 256)]).data, FormatError, "1 axes and a name of 256 bytes"),
    "unknown name": (
        build("ggml", [*llama(), Tensor("layers.1.ffn_norm.weight")]).data,
        FormatError,
        "tensor 'layers.1.ffn_norm.weight': a LLaMA of 1 layers has none of this name. It is of another model",
    ),
    "escape code in a name": (
        build("ggml", [Tensor(b"\x1b[2J\xff")]).data,
        FormatError,
        r"tensor '\x1b[2J\udcff': a",
    ),
    "name twice": (
        build("ggml", [*llama(), Tensor("norm.weight")]).data,
        FormatError,
        "tensor 'norm.weight': two tensors have this name",
    ),
    "type of another version": (
        build("ggjt v2", [Tensor("norm.weight", 4)]).data,
        UnsupportedError,
        "tensor 'norm.weight': weights of type 4, which ggjt v2 does not have",
    ),
    "unknown type": (
        build("ggml", [Tensor("norm.weight", 99)]).data,
        UnsupportedError,
        "weights of type 99, which",
    ),
    "rows": (
        build("ggjt v3", [Tensor("norm.weight", 12, (64,))]).data,
        FormatError,
        "tensor 'norm.weight': rows of 64 weights do not divide into Q4_K blocks of 256",
    ),
    "huge": (
        build("ggml", [Tensor("norm.weight", ne=(1, 1))]).data.replace(
            struct.pack("<2I", 1, 1) + b"norm", struct.pack("<2I", 2**32 - 1, 2**32 - 1) + b"norm"
        ),
        FormatError,
        f"tensor 'norm.weight': its data is bytes 118 to {118 + 4 * (2**32 - 1) ** 2}, but the file ends at 122. T",
    ),
    "tensors missing": (
        build("ggml", WITHOUT).data,
        FormatError,
        "1 of 12 tensors are missing, from 'layers.0.feed_forward.w3.weight' on. The file is probably truncated",
    ),
    "embedding": (
        build("ggml", llama(n_vocab=6)).data,
        FormatError,
        "tensor 'tok_embeddings.weight': shape [6, 256], where the header asks for [5, 256], or 1/2, 1/4 or 1/8 of the",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    data, kind, said = REFUSED[name]
    path = tmp_path / "m.bin"
    path.write_bytes(data)
    with pytest.raises(kind, match=re.escape(said)) as error:
        read_ggml(path)
    assert type(error.value) is kind
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).isprintable()
    assert kind is UnsupportedError or error.value.code in SEVERITIES


@pytest.mark.parametrize("type_", [10, 11, 12, 13, 14])
@pytest.mark.parametrize("n_tensors", [1, 12])
def test_super_blocks_of_64_are_named(
    type_: int, n_tensors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BLOCKS, "ggjt v3", BY_64)
    (tmp_path / "m.bin").write_bytes(build("ggjt v3", llama(type_)[:n_tensors]).data)
    said = "tensor 'tok_embeddings.weight': its blocks are of 64 weights, as llama.cpp built with LLAMA_QKK_64 wrote"
    with pytest.raises(UnsupportedError, match=re.escape(said)):
        read_ggml(tmp_path / "m.bin")


SMALL = build("ggjt v1", llama(n_vocab=5, dim=32, hidden=32), dim=32).data


def test_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "cut.bin"
    path.write_bytes(SMALL)
    n_tensors = len(read_ggml(path).tensors)
    vocabulary_end = len(build("ggjt v1", [], dim=32).data)
    for size in (*range(500), *range(500, len(SMALL), 97)):
        path.write_bytes(SMALL[:size])
        if size == vocabulary_end:
            assert not read_ggml(path).tensors  # what a file of a vocabulary only is
            continue
        with pytest.raises(FormatError):
            read_ggml(path)
    assert n_tensors == 12
    layout = llamatools.inspect(path)  # the last cut: shown as far as it makes sense
    assert (len(layout.tensors), [problem.code for problem in layout.problems]) == (12, ["truncated"])
    assert layout.stopped_at is None
    path.write_bytes(SMALL + struct.pack("<3I", 9, 9, 9))
    layout = llamatools.inspect(path)
    assert (len(layout.tensors), layout.stopped_at) == (12, len(SMALL))


def test_damage_never_ends_in_another_error(tmp_path: Path) -> None:
    draws = random.Random(3)
    path = tmp_path / "m.bin"
    n_accepted = 0
    for _ in range(600):
        data = bytearray(SMALL)
        for _ in range(draws.choice((1, 1, 3))):
            at = draws.randrange(400)
            if draws.randrange(2):
                data[at] = draws.randrange(256)
            else:
                data[at : at + 4] = struct.pack("<I", draws.choice((0, 1, 2, 255, 2**16, 2**31, 2**32 - 1)))
        path.write_bytes(data)
        try:
            layout = read_ggml(path)
        except LlamatoolsError:
            continue
        n_accepted += 1
        for tensor in layout.tensors:
            assert tensor.source is not None
            tensor.source.read(0, tensor.source.n_rows)
    assert n_accepted > 40
