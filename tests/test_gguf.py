"""GGUF read and written, held against gguf-py and llama.cpp both ways."""

from __future__ import annotations

import os
import re
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llamacpp
import numpy as np
import pytest
from gguf_files import STRING, U8, Tensor, array, build, key, scalar
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatools.dtypes import BY_ID, BY_NAME, DType
from llamatools.errors import FormatError, UnsupportedError, UsageError
from llamatools.formats import gguf_strings, gguf_write, window
from llamatools.formats.gguf import read_gguf
from llamatools.formats.gguf_write import encode_header
from llamatools.layout import Layout
from llamatools.metadata import Kind, Strings, Value, strings, u32
from llamatools.metadata import array as numbers

F32, Q4_K, I8 = BY_NAME["F32"], BY_NAME["Q4_K"], BY_NAME["I8"]

METADATA = {
    "general.architecture": Value(Kind.STRING, "llama"),
    "uint8": Value(Kind.UINT8, 255),
    "int8": Value(Kind.INT8, -128),
    "uint16": Value(Kind.UINT16, 65535),
    "int16": Value(Kind.INT16, -32768),
    "uint32": Value(Kind.UINT32, 2**32 - 1),
    "int32": Value(Kind.INT32, -(2**31)),
    "float32": Value(Kind.FLOAT32, 0.5),
    "bool": Value(Kind.BOOL, True),
    "uint64": Value(Kind.UINT64, 2**64 - 1),
    "int64": Value(Kind.INT64, -(2**63)),
    "float64": Value(Kind.FLOAT64, 0.1),
    "text": Value(Kind.STRING, "Zoë 🐲\n"),
    "texts": strings(["", "a", "Zoë", "x" * 300, "🐲\0"]),
    "numbers": numbers(Kind.INT32, np.array([1, -2, 3], np.int32)),
    "floats": numbers(Kind.FLOAT32, np.array([1.5, np.inf], np.float32)),
    "truths": numbers(Kind.BOOL, np.array([True, False, True])),
}
TENSORS: list[tuple[str, DType, tuple[int, ...]]] = [
    ("token_embd.weight", Q4_K, (3, 512)),
    ("blk.0.attn_norm.weight", F32, (5,)),
    ("blk.0.exps", BY_NAME["F16"], (2, 3, 1, 7)),
    ("last", I8, (33,)),
]


def plain(metadata: Any) -> dict[str, tuple[Kind, Kind | None, Any]]:
    """Metadata that `==` compares."""
    return {
        key: (value.kind, value.item, list(value.data) if value.kind is Kind.ARRAY else value.data)
        for key, value in metadata.items()
    }


def written(path: Path, alignment: int = 32) -> Path:
    """A file of ours with random data, by the plan that encode_header gives."""
    header = encode_header(METADATA, TENSORS, alignment)
    data = np.random.default_rng(0).integers(0, 256, header.file_size - header.data_offset, np.uint8)
    path.write_bytes(header.data + data.tobytes())
    return path


@pytest.mark.parametrize("alignment", [32, 64, 4096, 2 << 20])
def test_gguf_py_and_llamacpp_read_what_we_wrote(alignment: int, tmp_path: Path) -> None:
    path = written(tmp_path / "ours.gguf", alignment)
    ours = read_gguf(path)
    expected = METADATA | ({"general.alignment": u32(alignment)} if alignment != 32 else {})
    assert plain(ours.metadata) == plain(expected)
    assert list(ours.metadata) == list(expected)
    assert (ours.format, ours.alignment, ours.size) == ("GGUF v3", alignment, path.stat().st_size)
    assert [(t.name, t.dtype, t.shape) for t in ours.tensors] == TENSORS
    assert all(t.offset % alignment == 0 for t in ours.tensors)

    reader = gguf.GGUFReader(path)
    assert (reader.alignment, reader.data_offset) == (alignment, ours.data_offset)
    assert {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")} == {
        k: list(v.data) if v.kind is Kind.ARRAY else v.data for k, v in expected.items()
    }
    for theirs, tensor, (name, dtype, shape) in zip(reader.tensors, ours.tensors, TENSORS, strict=True):
        assert (theirs.name, theirs.tensor_type) == (name, dtype.id)
        assert tuple(reversed(theirs.shape.tolist())) == shape
        assert (theirs.data_offset, theirs.n_bytes) == (tensor.offset, tensor.nbytes)
        assert tensor.source is not None
        assert tensor.source.read(0, tensor.source.n_rows).tobytes() == theirs.data.tobytes()

    header = llamacpp.read_gguf(path)
    assert (header.version, header.alignment, header.data_offset) == (3, alignment, ours.data_offset)
    assert header.keys == tuple(expected)
    assert header.tensors == {
        t.name: llamacpp.GGUFTensor(t.dtype.id or 0, t.shape, t.offset - header.data_offset, t.nbytes)
        for t in ours.tensors
    }


@pytest.mark.parametrize("alignment", [32, 4096])
def test_we_read_what_gguf_py_wrote(alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for name, value in METADATA.items():
        if name != "general.architecture":
            data = list(value.data) if value.kind is Kind.ARRAY else value.data
            item = None if value.item is None else gguf.GGUFValueType(value.item)
            writer.add_key_value(name, data, gguf.GGUFValueType(value.kind), item)
    draws = np.random.default_rng(1)
    tensors = {
        "f32": draws.standard_normal((4, 6), np.float32),
        "f16": draws.standard_normal(7).astype(np.float16),
        "i32": np.arange(24, dtype=np.int32).reshape(2, 3, 4),
    }
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    q8_0 = gguf.quants.quantize(draws.standard_normal((3, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q8_0", q8_0, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    ours = read_gguf(path)
    added = {"general.alignment": u32(alignment)} if alignment != 32 else {}
    assert plain(ours.metadata) == plain(METADATA | added)
    assert ours.alignment == alignment
    assert [t.name for t in ours.tensors] == [*tensors, "q8_0"]
    for tensor in ours.tensors:
        theirs = tensors.get(tensor.name, q8_0)
        assert tensor.shape == ((3, 64) if tensor.name == "q8_0" else theirs.shape)
        assert tensor.dtype.name == tensor.name.upper()
        assert tensor.source is not None
        assert tensor.source.read(0, tensor.source.n_rows).tobytes() == theirs.tobytes()


def test_version_2_reads_as_version_3(tmp_path: Path) -> None:
    layouts = {}
    for version in (2, 3):
        path = tmp_path / f"v{version}.gguf"
        path.write_bytes(build([key("k", scalar(STRING, "v"))], [Tensor("t", ne=(4, 2))], version=version))
        assert llamacpp.read_gguf(path).version == version
        layouts[version] = read_gguf(path)
    assert [layout.format for layout in layouts.values()] == ["GGUF v2", "GGUF v3"]
    assert layouts[2].metadata == layouts[3].metadata
    assert layouts[2].tensors[0].offset == layouts[3].tensors[0].offset
    assert layouts[2].tensors[0].shape == (2, 4)


def test_names_and_texts_need_not_be_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "bytes.gguf"
    file = build(
        [key(b"k\xff", scalar(STRING, b"\xfe\x80")), key("many", array(STRING, [b"\xff", b"\xc3"]))],
        [Tensor(b"t\xf0\x9f", 24, (32,))],
    )
    path.write_bytes(file)
    layout = read_gguf(path)
    header = encode_header(layout.metadata, [(t.name, t.dtype, t.shape) for t in layout.tensors])
    assert header.data + bytes(range(32)) == file
    assert (header.offsets, header.file_size) == ((layout.tensors[0].offset,), len(file))


def test_any_byte_but_zero_is_true(tmp_path: Path) -> None:
    path = tmp_path / "truths.gguf"
    kind = struct.pack("<I", Kind.BOOL)
    path.write_bytes(
        build([key("truth", kind + b"\2"), key("truths", struct.pack("<IIQ", 9, Kind.BOOL, 3) + b"\0\1\xff")])
    )
    metadata = read_gguf(path).metadata
    assert metadata["truth"].data is True
    assert metadata["truths"].data.view(np.uint8).tolist() == [0, 1, 1]  # and not what the bytes were


def test_a_tensor_without_axes_is_one_weight(tmp_path: Path) -> None:
    path = tmp_path / "scalar.gguf"
    path.write_bytes(build(tensors=[Tensor("scalar", ne=())]))
    assert llamacpp.read_gguf(path).tensors["scalar"].nbytes == 4
    (tensor,) = read_gguf(path).tensors
    assert (tensor.shape, tensor.nbytes) == ((), 4)


def test_every_type_of_weights_has_ggmls_size(tmp_path: Path) -> None:
    names = [f"{id_}" for id_ in BY_ID]
    header = encode_header({}, [(n, d, (2, 256 * 3)) for n, d in zip(names, BY_ID.values(), strict=True)])
    path = tmp_path / "types.gguf"
    path.write_bytes(header.data + bytes(header.file_size - header.data_offset))
    theirs = llamacpp.read_gguf(path).tensors
    assert {t.name: t.nbytes for t in read_gguf(path).tensors} == {name: theirs[name].nbytes for name in names}
    assert {t.name: BY_ID[t].name for t in gguf.GGMLQuantizationType} == {
        t.name: t.name for t in gguf.GGMLQuantizationType
    }


# ---- strings ----


def walked(file: bytes, at: int, n: int) -> list[bytes]:
    """The n strings from `at` on, found the slow way."""
    found = []
    for _ in range(n):
        (length,) = struct.unpack_from("<Q", file, at)
        found.append(file[at + 8 : at + 8 + length])
        assert len(found[-1]) == length
        at += 8 + length
    return found


def read_texts(path: Path, texts: Sequence[bytes]) -> list[bytes]:
    """The texts after a way through a file; other keys lie before and behind them."""
    path.write_bytes(
        build([key("before", scalar(U8, 1)), key("texts", array(STRING, texts)), key("behind", scalar(U8, 2))])
    )
    metadata = read_gguf(path).metadata
    assert metadata["behind"].data == 2
    found = metadata["texts"].data
    assert isinstance(found, Strings)
    singly = [found[n] for n in range(len(found))]
    assert list(found) == singly
    return [text.encode("utf-8", "surrogateescape") for text in singly]


def texts_of(seed: int, n: int, zeros: float, long: float) -> list[bytes]:
    """Texts like a vocabulary's, of which some hold zeros or are empty, and some are long."""
    draws = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        length = int(draws.integers(250, 700)) if draws.random() < long else int(draws.integers(1, 12))
        text = draws.integers(1, 256, length, np.uint8)
        if draws.random() < zeros:
            text = (
                text[: int(draws.integers(0, 3))] * 0 if draws.random() < 0.5 else text * draws.integers(0, 2, length)
            )
        texts.append(text.astype(np.uint8).tobytes())
    return texts


@pytest.mark.parametrize("zeros", [0, 0.001, 0.02, 0.5, 1])
@pytest.mark.parametrize("long", [0, 0.01, 1])
def test_many_strings_are_found_as_by_walking(zeros: float, long: float, tmp_path: Path) -> None:
    texts = texts_of(seed=2, n=6000, zeros=zeros, long=long)
    assert read_texts(tmp_path / "texts.gguf", texts) == texts


def test_a_string_longer_than_all_that_is_searched_at_once(tmp_path: Path) -> None:
    texts = [b"a"] * 500 + [b"b" * 300_000] + [b"c"] * 500 + [b"\0" * 70_000] + [b"d"] * 500
    assert read_texts(tmp_path / "texts.gguf", texts) == texts


short_texts = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.text(max_size=8).map(str.encode),
        st.integers(0, 40).map(bytes),
        st.sampled_from((b"x" * 255, b"x" * 256, b"x" * 257, b"\0" * 256, b"x" * 65_535, b"x" * 65_536)),
    ),
    max_size=60,
)


@given(texts=short_texts, piece=st.integers(8, 300), few=st.integers(0, 8), n_walked=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_any_strings_are_found_as_by_walking(
    texts: list[bytes], piece: int, few: int, n_walked: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("texts") / "texts.gguf"
    with pytest.MonkeyPatch.context() as patch:  # so that every seam is met
        patch.setattr(gguf_strings, "PIECE", piece)
        patch.setattr(gguf_strings, "FEW", few)
        patch.setattr(gguf_strings, "WALKED", n_walked)
        patch.setattr(window, "STEP", piece)
        patch.setattr(window, "CAPACITY", piece)
        assert read_texts(path, texts) == texts


@given(data=st.binary(max_size=200) | st.lists(st.sampled_from(b"\0\0\0\0\1\x09a"), max_size=200).map(bytes))
@settings(max_examples=500)
def test_lengths_that_are_called_certain_are(data: bytes) -> None:
    lengths = gguf_strings.certain_lengths(np.frombuffer(data, np.uint8))
    padded = data + bytes(1 << 20)  # the text of the last may go on behind what was searched
    assert [len(text) for text in walked(padded, 0, len(lengths))] == lengths.tolist()


def test_strings_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    file = build([key("texts", array(STRING, [b"text"] * 3000))])
    path.write_bytes(file)
    read_gguf(path)
    for size in range(65, len(file) - 40, 997):
        path.write_bytes(file[:size])
        with pytest.raises(FormatError, match=r"key 'texts': .*(can follow|the file ends at \d+)\. The file is"):
            read_gguf(path)


# ---- limits ----


def test_a_header_of_claims_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    head = build([key("numbers", struct.pack("<IIQ", 9, Kind.UINT64, 2**29))])
    path.write_bytes(head)
    os.truncate(path, 2**33)  # sparse: the claim could be true
    tracemalloc.start()
    with pytest.raises(
        FormatError, match=f"key 'numbers': the header reaches byte {55 + 2**32}, where {256 << 20} are"
    ):
        read_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < window.CAPACITY + (4 << 20)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(build())
    with open(path, "rb") as file:
        with pytest.raises(FormatError, match="it had 100 bytes, but now ends at 32. It changed while it was read"):
            window.Window(file.fileno(), 100).peek(64)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for data, said in (
        (b"", "the file is empty"),
        (b"<!DOCTYPE html>", "a web page of 15 bytes"),
        (bytes(64), "its first 64 bytes are zeros"),
        (b"ggjt\1", r"no GGUF file: it begins with b'ggjt'"),
        (b"GGUF\3\0", "header: bytes 0 to 8 are needed, but the file ends at 6. The file is probably truncated"),
    ):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=re.escape(said)):
            read_gguf(path)


# ---- what cannot be written ----


@pytest.mark.parametrize("alignment", [0, 1, 16, 48, 4 << 20, -32])
def test_alignments_that_are_not_written(alignment: int) -> None:
    with pytest.raises(UsageError, match=f"--align: {alignment} is no power of two from 32 to 2097152"):
        encode_header({}, [], alignment)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (("n" * 64, F32, (1,)), "a name of 64 bytes, where GGUF allows 63"),
        (("é" * 32, F32, (1,)), "a name of 64 bytes, where GGUF allows 63"),
        (("t", F32, ()), "tensor 't': 0 axes, where GGUF allows 1 to 4"),
        (("t", F32, (1, 1, 1, 1, 1)), "tensor 't': 5 axes, where GGUF allows 1 to 4"),
        (
            ("t", Q4_K, (2, 100)),
            "tensor 't': rows of 100 weights do not divide into Q4_K blocks of 256. Add a rule giving it F16",
        ),
    ],
)
def test_tensors_that_cannot_be_written(tensor: tuple[str, DType, tuple[int, ...]], said: str) -> None:
    with pytest.raises(FormatError, match=re.escape(said) + "$"):
        encode_header({}, [tensor])


def test_what_else_cannot_be_written() -> None:
    with pytest.raises(UnsupportedError, match="tensor 't': GGUF has no type for C64 weights"):
        encode_header({}, [("t", BY_NAME["C64"], (1,))])
    with pytest.raises(FormatError, match="tensor 't': two tensors have this name"):
        encode_header({}, [("t", F32, (1,)), ("u", F32, (1,)), ("t", F32, (2,))])
    with pytest.raises(FormatError, match=r"key 'k\\ud800': half a surrogate pair, which is no character"):
        encode_header({"k\ud800": u32(1)}, [])
    with pytest.raises(FormatError, match=r"key 'k': half a surrogate pair, which is no character"):
        encode_header({"k": strings(["\ud800"])}, [])
    with pytest.raises(FormatError, match="a key without a name, which GGUF does not allow"):
        encode_header({"": u32(1)}, [])


def test_names_of_63_bytes_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    header = encode_header({}, [("n" * 63, F32, (8,))])
    path.write_bytes(header.data + bytes(32))
    assert list(llamacpp.read_gguf(path).tensors) == [t.name for t in read_gguf(path).tensors] == ["n" * 63]


# ---- any metadata ----

kinds = [kind for kind in Kind if kind not in (Kind.ARRAY, Kind.STRING)]
any_text = st.text() | st.binary(max_size=9).map(lambda data: data.decode("utf-8", "surrogateescape"))


@st.composite
def values(draw: st.DrawFn) -> Value:
    kind = draw(st.sampled_from(list(Kind)))
    item = draw(st.sampled_from([k for k in Kind if k is not Kind.ARRAY])) if kind is Kind.ARRAY else None
    n = 1 if item is None else draw(st.integers(0, 5))
    stored = kind if item is None else item
    if stored is Kind.STRING:
        texts = [draw(any_text) for _ in range(n)]
        return Value(kind, texts[0]) if item is None else strings(texts)
    data = draw(st.binary(min_size=8 * n, max_size=8 * n))
    dtype = np.dtype(gguf_write.NUMBERS[stored])
    many = np.frombuffer(data, np.uint8)[:n] > 99 if stored is Kind.BOOL else np.frombuffer(data, dtype, n)
    many = np.nan_to_num(many) if many.dtype.kind == "f" else many  # NaN equals nothing
    return Value(kind, many[0].item()) if item is None else numbers(item, many)


@given(metadata=st.dictionaries(any_text.filter(bool), values(), max_size=8))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read(metadata: dict[str, Value], tmp_path_factory: pytest.TempPathFactory) -> None:
    metadata.pop("general.alignment", None)
    path = tmp_path_factory.mktemp("any") / "any.gguf"
    path.write_bytes(encode_header(metadata, []).data)
    layout: Layout = read_gguf(path)
    assert plain(layout.metadata) == plain(metadata)
    assert list(layout.metadata) == list(metadata)


@pytest.mark.parametrize("seed", range(20))
def test_different_strings_are_counted(seed: int) -> None:
    draws = np.random.default_rng(seed)
    texts = [bytes(draws.choice([0, 97, 98], draws.choice([0, 1, 7, 8, 9, 16, 17, 20]))) for _ in range(60)]
    ends = np.cumsum([len(text) for text in texts])
    starts = ends - [len(text) for text in texts]
    assert Strings(b"".join(texts), starts, ends).n_distinct() == len(set(texts))
