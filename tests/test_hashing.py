"""`inspect --hash`: digests as hashlib gives them of gguf-py's reading, in any container; damage and staleness."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from meta_checkpoints import LLAMA_3, tied, write_meta
from same_models import OPTIONS, Q, data_of, params, state_of, write_hf
from tiny_llamas import TINY, random_weights, write_gguf

import llamatools
from llamatools.check.hashing import metadata_sha256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes) -> Path:
    """meta (one shard), shards (four), m.gguf at alignment 32 and aligned.gguf at 4096, hf."""
    folder = tmp_path_factory.mktemp("m")
    write_meta(folder / "meta", state_of(), params(), sentencepiece_model)
    write_meta(folder / "shards", state_of(), params(), sentencepiece_model, n_shards=4, embedding_axis=LLAMA_3)
    llamatools.convert(folder / "meta", folder / "m.gguf", options=OPTIONS)
    llamatools.convert(folder / "shards", folder / "aligned.gguf", options=OPTIONS, alignment=4096)
    write_hf(folder / "hf", state_of())
    return folder


def their_weights(path: Path) -> str:
    """The definition of docs/reference/digests.md, by hashlib of what gguf-py reads."""
    lines = []
    for t in gguf.GGUFReader(path).tensors:
        shape, sha256 = "x".join(map(str, t.shape[::-1])), hashlib.sha256(t.data.tobytes()).hexdigest()
        lines.append(f"{t.name} {t.tensor_type.name} {shape} {sha256}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def test_digests_are_hashlibs(folder: Path) -> None:
    path = folder / "aligned.gguf"
    found = llamatools.digests(path)
    theirs = {t.name: hashlib.sha256(t.data.tobytes()).hexdigest() for t in gguf.GGUFReader(path).tensors}
    assert {tensor.name: tensor.sha256 for tensor in found.tensors} == theirs
    assert found.weights == their_weights(path)
    assert (found.findings, found.checked) == ((), 30)


def test_weights_have_one_digest_in_every_container(folder: Path) -> None:
    expected = their_weights(folder / "m.gguf")
    shuffled = dict(reversed(random_weights(TINY).items()))
    write_gguf(folder / "shuffled.gguf", shuffled, TINY)
    for name in ("meta", "shards", "m.gguf", "aligned.gguf", "shuffled.gguf", "hf"):
        assert llamatools.digests(folder / name).weights == expected, name
    assert llamatools.digests(folder / "m.gguf", threads=1).weights == expected


def test_norms_in_bfloat16_and_a_tied_output_change_nothing(
    folder: Path, tmp_path: Path, sentencepiece_model: bytes
) -> None:
    source = write_meta(tmp_path / "m", tied(state_of()), params(), sentencepiece_model, dtype=torch.bfloat16)
    llamatools.convert(source, tmp_path / "m.gguf", options=OPTIONS)
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors]
    assert "output.weight" not in names
    assert llamatools.digests(source).weights == their_weights(tmp_path / "m.gguf")


def test_damage_is_told_from_a_change_of_dtype(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(folder / "m.gguf", tmp_path / "bad.gguf"))
    before = hashlib.sha256(data_of(path)[Q].tobytes()).hexdigest()
    data_of(path)[Q][3, 4] ^= 16
    after = hashlib.sha256(data_of(path)[Q].tobytes()).hexdigest()
    found = llamatools.digests(path)
    assert [f"{f.severity}: {f.code}: {f}" for f in found.findings] == [
        f"error: digest: tensor '{Q}': its bytes have SHA-256 {after}, but {before} is stored: they changed since. "
        "The file is damaged; make or download it again"
    ]
    assert found.checked == 29


def test_digests_of_another_dtype_are_stale(folder: Path, tmp_path: Path) -> None:
    """A tool that keeps the keys quantizes one tensor, renames another."""
    reader = gguf.GGUFReader(folder / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "other")
    for name in ("names", "dtypes", "shapes", "sha256"):
        field = reader.fields[f"llamatools.tensor.{name}"]
        writer.add_array(field.name, field.contents())
    for tensor in reader.tensors:
        if tensor.name == Q:
            quantized = gguf.quants.quantize(np.array(tensor.data), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(Q, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor("head.weight" if tensor.name == "output.weight" else tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = llamatools.digests(tmp_path / "m.gguf")
    assert [f"{f.severity}: {f.code}: {f}" for f in found.findings] == [
        f"note: digest-stale: 1 of 30 stored digests are of another dtype or shape: '{Q}' was F32 64x64 and is Q8_0 "
        "64x64",
        "warning: digest-lost: 1 of 30 stored digests are of tensors that are not here, such as 'output.weight'",
    ]
    assert found.checked == 28


def test_the_metadatas_digest_is_of_the_model(folder: Path) -> None:
    """Not of its alignment or provenance; by gguf-py's writing of one key."""
    one, other = (llamatools.digests(folder / name).metadata for name in ("m.gguf", "aligned.gguf"))
    assert one == other
    writer = gguf.GGUFWriter(folder / "key.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    written = (folder / "key.gguf").read_bytes()[24:]
    assert metadata_sha256(llamatools.open(folder / "m.gguf").metadata) == one
    assert metadata_sha256({}) is None
    assert metadata_sha256(llamatools.inspect(folder / "key.gguf").metadata) == hashlib.sha256(written).hexdigest()
