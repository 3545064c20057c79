"""GGUF sets: written by gguf-py, and damaged shard by shard."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import I32, STRING, U16, U32, Tensor, build, key, scalar
from tiny_llamas import TINY, random_weights

import llamatools
from llamatools import names
from llamatools.check import SEVERITIES
from llamatools.errors import FormatError
from llamatools.formats.gguf_split import read_gguf_set

WEIGHTS = random_weights(TINY)


def write_set(path: Path, *, small_first_shard: bool = False) -> list[Path]:
    """A llama in shards of 10 tensors by gguf-py's split writer."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=10, small_first_shard=small_first_shard)
    writer.add_context_length(TINY.max_seq_len)
    writer.add_embedding_length(TINY.dim)
    writer.add_block_count(TINY.n_layers)
    writer.add_feed_forward_length(TINY.hidden_dim)
    writer.add_head_count(TINY.n_heads)
    writer.add_head_count_kv(TINY.n_kv_heads)
    writer.add_layer_norm_rms_eps(TINY.norm_eps)
    writer.add_vocab_size(TINY.vocab_size)
    for name, weights in WEIGHTS.items():
        writer.add_tensor(names.meta_to_gguf(name), weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-*.gguf"))


@pytest.mark.parametrize("small_first_shard", [False, True], ids=["", "first without tensors"])
def test_any_shard_of_a_set_by_gguf_py_is_the_whole_model(small_first_shard: bool, tmp_path: Path) -> None:
    paths = write_set(tmp_path / "tiny.gguf", small_first_shard=small_first_shard)
    assert len(paths) == 3 + small_first_shard
    readers = [gguf.GGUFReader(path) for path in paths]
    theirs = [
        (t.name, n, t.tensor_type.name, tuple(map(int, reversed(t.shape))), t.data_offset, t.n_bytes)
        for n, reader in enumerate(readers)
        for t in reader.tensors
    ]
    for path in paths:
        layout = llamatools.inspect(path)
        assert [(t.name, t.file, t.dtype.name, t.shape, t.offset, t.nbytes) for t in layout.tensors] == theirs
    assert [(file.path, file.size) for file in layout.files] == [(path, path.stat().st_size) for path in paths]
    fields = {name: field.contents() for name, field in readers[0].fields.items() if not name.startswith("GGUF.")}
    assert {name: value.data for name, value in layout.metadata.items()} == fields
    assert layout.format == "GGUF v3"
    assert layout.alignment == 32
    assert layout.hparams is not None
    assert (layout.hparams.dim, layout.hparams.n_kv_heads) == (TINY.dim, TINY.n_kv_heads)

    checkpoint = llamatools.open(paths[1])
    assert checkpoint.scheme == "gguf"
    assert [file.path for file in checkpoint.files] == paths
    for name, weights in WEIGHTS.items():
        tensor = checkpoint.tensors[names.meta_to_gguf(name)]
        np.testing.assert_array_equal(tensor.read(0, tensor.n_rows).reshape(weights.shape), weights)


def shard(number: int, *, count: int = 2, total: int = 2, more: list[bytes] | None = None, **parts: object) -> bytes:
    keys = [key("split.no", scalar(U16, number)), key("split.count", scalar(U16, count))]
    keys += [key("split.tensors.count", scalar(I32, total)), *(more or [])]
    return build(keys, **({"tensors": [Tensor(f"t{number}")]} | parts))  # type: ignore[arg-type]


def test_each_shard_has_its_own_alignment(tmp_path: Path) -> None:
    aligned = [key("general.alignment", scalar(U32, 128))]
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(shard(0, more=aligned, alignment=128))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(shard(1))
    layout = read_gguf_set(tmp_path / "m-00001-of-00002.gguf")
    assert layout.alignment == 32
    assert [t.offset % t_alignment for t, t_alignment in zip(layout.tensors, (128, 32), strict=True)] == [0, 0]


def test_shards_by_gguf_py_whose_alignment_it_forgot(tmp_path: Path) -> None:
    """Its split writer states a custom alignment in the first shard only."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_custom_alignment(4096)
    for n in range(4):
        writer.add_tensor(f"t{n}", np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = "key 'general.alignment': the tensors' offsets are the running sum for 4096, but general.alignment is not"
    with pytest.raises(FormatError, match=f"m-00002-of-00002.gguf: {said}"):
        read_gguf_set(tmp_path / "m-00001-of-00002.gguf")


def test_a_set_of_one_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "any name.gguf"
    path.write_bytes(shard(0, count=1))
    assert read_gguf_set(path).data_offset is not None


# What is done to the files of a sound set of two, and what is then said of the first.
REFUSED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (
        lambda first, second: second.unlink(),
        "m-00001-of-00002.gguf: 1 of its 2 shards is missing: m-00002-of-00002.gguf. Put all shards into one folder",
    ),
    "many missing": (
        lambda first, second: first.rename(first.with_name("m-00001-of-65535.gguf")).write_bytes(shard(0, count=65535)),
        "65534 of its 65535 shards are missing: m-00002-of-65535.gguf, m-00003-of-65535.gguf, m-00004-of-65535.gguf, "
        "m-00005-of-65535.gguf, m-00006-of-65535.gguf and others. Put",
    ),
    "swapped": (
        lambda first, second: first.write_bytes(shard(1)),
        "m-00001-of-00002.gguf: it is shard 2 of 2, so its name must end in '-00002-of-00002.gguf'. Give all shards ",
    ),
    "other swapped": (
        lambda first, second: second.write_bytes(shard(0)),
        "m-00002-of-00002.gguf: key 'split.no': 0, where its name says 1. It was renamed",
    ),
    "other of a larger set": (
        lambda first, second: second.write_bytes(shard(1, count=3)),
        "m-00002-of-00002.gguf: key 'split.count': 3, where its name says 2. It was renamed",
    ),
    "other of no set": (
        lambda first, second: second.write_bytes(build()),
        "m-00002-of-00002.gguf: key 'split.count': required in every shard, but missing",
    ),
    "no number": (
        lambda first, second: first.write_bytes(build([key("split.count", scalar(U16, 2))])),
        "m-00001-of-00002.gguf: key 'split.no': required in every shard, but missing",
    ),
    "count of another kind": (
        lambda first, second: first.write_bytes(build([key("split.count", scalar(U32, 2))])),
        "m-00001-of-00002.gguf: key 'split.count': uint32 where uint16 is required",
    ),
    "name twice": (
        lambda first, second: second.write_bytes(shard(1, tensors=[Tensor("t0")])),
        "m-00002-of-00002.gguf: tensor 't0': m-00001-of-00002.gguf has one of this name, too",
    ),
    "tensor lost": (
        lambda first, second: second.write_bytes(shard(1, tensors=[])),
        "m-00001-of-00002.gguf: key 'split.tensors.count': 2, but all shards together have 1 tensors",
    ),
    "another model": (
        lambda first, second: second.write_bytes(shard(1, more=[key("general.name", scalar(STRING, "other"))])),
        "m-00002-of-00002.gguf: key 'general.name': not what m-00001-of-00002.gguf says. It is a shard of another mod",
    ),
    "truncated": (
        lambda first, second: second.write_bytes(shard(1)[:-1]),
        "m-00002-of-00002.gguf: tensor 't1': its data is bytes",
    ),
    "a folder in its place": (lambda first, second: (second.unlink(), second.mkdir()), "1 of its 2 shards is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    first.write_bytes(shard(0, more=[key("general.name", scalar(STRING, "mine"))]))
    second.write_bytes(shard(1))
    assert len(read_gguf_set(first).tensors) == 2
    damage, said = REFUSED[case]
    damage(first, second)
    with pytest.raises(FormatError, match=re.escape(said)) as error:
        llamatools.open(first if first.exists() else tmp_path / "m-00001-of-65535.gguf")
    assert error.value.code in SEVERITIES


def test_what_is_left_of_a_set_is_shown(tmp_path: Path) -> None:
    paths = write_set(tmp_path / "tiny.gguf")
    whole = llamatools.inspect(paths[0])
    assert not whole.problems
    paths[0].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:-4096])
    layout = llamatools.inspect(paths[1])
    assert [file.path for file in layout.files] == paths[1:]
    assert [(t.name, t.offset) for t in layout.tensors] == [(t.name, t.offset) for t in whole.tensors if t.file]
    assert [(problem.file, problem.code) for problem in layout.problems][:2] == [
        (str(paths[1]), "shard-missing"),
        (str(paths[2]), "truncated"),
    ]
    # A shard that is no GGUF at all is left out; one under another name is shown for itself.
    paths[2].write_bytes(b"<html>")
    layout = llamatools.inspect(paths[1])
    assert (len(layout.files), layout.problems[1].code) == (1, "web-page")
    lone = paths[1].rename(tmp_path / "lone.gguf")
    layout = llamatools.inspect(lone)
    assert ([file.path for file in layout.files], layout.problems[0].code) == ([lone], "shard-name")
