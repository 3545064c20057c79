"""GGUF files laid out anew: mended, aligned, split and joined; llama.cpp and gguf-py judge before and after."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llamacpp
import pytest
from gguf_files import U32, Tensor, scalar
from llama_files import data_start, llama, written
from same_models import state_of, write_hf
from test_check import PLANTED, norm_at, swapped
from test_docs import examples

import llamatools
from llamatools import MetaOptions, Overrides, plan
from llamatools.cli.convert_command import _nbytes
from llamatools.draft import Drafts
from llamatools.errors import FormatError, SpaceError, UnsupportedError, UsageError
from llamatools.provenance import recorded_digests

ROOT = Path(__file__).parents[1]
TINY = ROOT / "fixtures" / "tiny-llama"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF that llamatools wrote, aligned to 4096."""
    path = tmp_path_factory.mktemp("sound") / "sound.gguf"
    llamatools.convert(TINY, path, alignment=4096, options=MetaOptions(overrides=Overrides(context=64)))
    return path


def copied(source: Path, path: Path, *, stated: bool = True, **how: Any) -> Path:
    """The file, written anew by gguf-py for an alignment of 32 though its keys say 4096: llama-quantize's fault."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path, "llama", **how)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            item = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], item)
    if not stated:
        writer.add_custom_alignment(4096)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def contents(path: Path) -> tuple[dict[str, object], dict[str, tuple[str, bytes]]]:
    """Keys and tensors as gguf-py reads them."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return keys, {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in reader.tensors}


def test_what_llama_quantize_breaks_is_mended(sound: Path, tmp_path: Path) -> None:
    broken, fixed = copied(sound, tmp_path / "broken.gguf"), tmp_path / "fixed.gguf"
    assert llamacpp.load_error(broken)
    done = llamatools.convert(broken, fixed)
    assert done.mended == (
        f"{broken}: key 'general.alignment': the tensors' offsets are the running sum for 32, but general.alignment "
        "says 4096",
    )
    assert [(note.what, note.value, note.reason) for note in done.notes] == [
        ("alignment", "4096", "the source says so")
    ]
    assert fixed.read_bytes() == sound.read_bytes()
    assert llamacpp.load_error(fixed) is None


def test_what_gguf_py_forgets_in_a_set_is_mended(sound: Path, tmp_path: Path) -> None:
    copied(sound, tmp_path / "m.gguf", stated=False, split_max_tensors=8)
    shards = sorted(tmp_path.glob("m-*.gguf"))
    assert len(shards) == 4
    assert llamacpp.load_error(shards[0])
    done = llamatools.convert(shards[2], tmp_path / "fixed.gguf")
    assert len(done.mended) == 3
    assert [note.what for note in done.notes] == ["alignment", "files"]
    assert contents(tmp_path / "fixed.gguf") == contents(sound)
    assert llamacpp.load_error(tmp_path / "fixed.gguf") is None


AT_24 = {"general.alignment": scalar(U32, 24)}
AT_8 = {"general.alignment": scalar(U32, 8)}
MORE = [Tensor("x", 24, (5,)), Tensor("y", offset=42_388)]
# Files whose data are whole, the bytes of their data, how these are padded, and the tensors that are elsewhere in them.
MENDED: dict[str, tuple[bytes, int, int, dict[str, int]]] = {
    "hole": (
        llama(tensors=norm_at(42_240 + 32)) + bytes(range(32)),
        42_400,
        32,
        {"output_norm.weight": 42_240 + 32},
    ),
    "order": (llama(tensors=swapped()), 42_368, 32, {"blk.0.attn_k.weight": 11392, "blk.0.attn_v.weight": 9344}),
    "padding": (llama(more_tensors=MORE)[:-12], 42_388 + 128, 32, {"y": 42_388}),
    "alignment-value": (llama(AT_24), 42_368, 32, {}),
    "for 4096, which it does not say": (llama(alignment=4096), 61_440, 4096, {}),
    "for 8": (llama(AT_8, alignment=8), 42_368, 8, {}),
    "bytes at the end": (llama() + b"!" * 100, 42_468, 32, {}),
}


@pytest.mark.parametrize("case", MENDED)
def test_mended(case: str, tmp_path: Path) -> None:
    data, nbytes, alignment, elsewhere = MENDED[case]
    path = written(tmp_path / "m.gguf", data)
    done = llamatools.convert(path, tmp_path / "fixed.gguf", alignment=64)
    assert bool(done.mended) is (case != "for 8")
    fixed, header = (tmp_path / "fixed.gguf").read_bytes(), llamacpp.read_gguf(tmp_path / "fixed.gguf")
    assert header.alignment == 64
    sums = 0
    for name, tensor in header.tensors.items():
        mended = header.data_offset + tensor.offset
        before = len(data) - nbytes + elsewhere.get(name, sums)
        assert fixed[mended : mended + tensor.nbytes] == data[before : before + tensor.nbytes], name
        sums += -(-tensor.nbytes // alignment) * alignment


def test_an_alignment_below_what_is_written_is_raised(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", MENDED["for 8"][0])
    done = llamatools.convert(path, tmp_path / "fixed.gguf")
    assert (done.layout.alignment, done.notes[0].reason) == (32, "the source says 8, which is not written")


START = data_start()
# What is not mended, and what is said of it.
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "an overlap": (
        lambda: llama(tensors=norm_at(42_240 - 32), cut=32),
        "tensor 'output_norm.weight': its data begin at byte",
    ),
    "data cut off": (lambda: llama(cut=200), "its data is bytes"),
    "a hole, and more bytes than that": (
        lambda: llama(tensors=norm_at(42_240 + 32)) + bytes(range(132)),
        f"m.gguf: its tensors' data would be bytes {START} to {START + 42_400}, but the file ends at {START + 42_500}: "
        "nothing tells where they begin. Make or download the file again",
    ),
    "an alignment that cannot be, and more bytes": (
        lambda: llama(AT_24) + bytes(100),
        "nothing tells where they begin. Make or download the file again",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_not_mended(case: str, tmp_path: Path) -> None:
    make, said = REFUSED[case]
    path = written(tmp_path / "m.gguf", make())
    with pytest.raises(FormatError, match=re.escape(said)):
        llamatools.convert(path, tmp_path / "fixed.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["m.gguf"]


def test_weights_in_super_blocks_of_64_are_no_holes(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", PLANTED["super-blocks of 64"][0])
    with pytest.raises(UnsupportedError, match="tensor 'a': its blocks are of 64 weights"):
        llamatools.convert(path, tmp_path / "fixed.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["m.gguf"]


def test_weights_damaged_since_they_were_written_are_not_passed_on(sound: Path, tmp_path: Path) -> None:
    """As llama-gguf-split leaves them where a shard it merges was cut off: the sizes are right, the bytes are not."""
    (tensor,) = (t for t in llamatools.inspect(sound).tensors if t.name == "blk.1.ffn_down.weight")
    data = bytearray(sound.read_bytes())
    data[tensor.end - 30_000 : tensor.end] = bytes(30_000)
    path = written(tmp_path / "m.gguf", bytes(data))
    assert llamacpp.load_error(path) is None, "nothing else notices"
    stored = recorded_digests(llamatools.inspect(path).metadata)[tensor.name].sha256
    said = f"m.gguf: tensor 'blk.1.ffn_down.weight': its bytes have the SHA-256 [0-9a-f]{{64}}, but {stored} was stored"
    with pytest.raises(FormatError, match=said):
        llamatools.convert(path, tmp_path / "fixed.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["m.gguf"]


def test_a_digest_of_another_dtype_is_replaced(sound: Path, tmp_path: Path) -> None:
    """llama-quantize carries the keys over, though the tensors are others."""
    llamatools.quantize(sound, tmp_path / "small.gguf", "q8_0")
    data = (tmp_path / "small.gguf").read_bytes()
    recorded = llamatools.inspect(sound).metadata["llamatools.tensor.dtypes"].data
    old = b"".join(struct.pack("<Q", len(name)) + name.encode() for name in recorded)
    new = [t.dtype.name for t in llamatools.inspect(tmp_path / "small.gguf").tensors]
    data = data.replace(b"".join(struct.pack("<Q", len(name)) + name.encode() for name in new), old[: len(old)])
    digests = recorded_digests(llamatools.inspect(tmp_path / "small.gguf").metadata)
    llamatools.convert(tmp_path / "small.gguf", tmp_path / "again.gguf", alignment=64)
    assert recorded_digests(llamatools.inspect(tmp_path / "again.gguf").metadata) == digests


@pytest.mark.parametrize("alignment", [32, 4096])
def test_split_and_joined(alignment: int, sound: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    llamatools.convert(sound, whole, alignment=alignment)
    limit = 1_500_000
    done = llamatools.convert(whole, tmp_path / "set.gguf", split_size=limit, threads=1)
    llamatools.convert(whole, tmp_path / "same.gguf", split_size=limit, threads=4)
    shards = sorted(tmp_path.glob("set-*.gguf"))
    assert [shard.name for shard in shards] == [f"set-0000{n}-of-00004.gguf" for n in (1, 2, 3, 4)]
    assert [file.path for file in done.layout.files] == shards
    assert [shard.read_bytes() for shard in shards] == [
        shard.read_bytes() for shard in sorted(tmp_path.glob("same-*.gguf"))
    ]
    assert max(shard.stat().st_size for shard in shards) <= limit
    tensors: dict[str, tuple[str, bytes]] = {}
    kinds = {
        "split.no": "UINT16",
        "split.count": "UINT16",
        "split.tensors.count": "INT32",
        "general.alignment": "UINT32",
    }
    for n, shard in enumerate(shards):
        reader = gguf.GGUFReader(shard)
        assert {key: reader.fields[key].types[0].name for key in kinds} == kinds
        keys, part = contents(shard)
        assert [keys[key] for key in kinds] == [n, 4, 30, alignment]
        assert n == 0 or set(keys) == set(kinds)
        assert not tensors.keys() & part.keys()
        tensors |= part
    assert tensors == contents(whole)[1]
    assert llamacpp.load_error(shards[0]) is None

    llamatools.convert(shards[3], tmp_path / "joined.gguf")
    keys, tensors = contents(tmp_path / "joined.gguf")
    assert (keys | {"general.alignment": alignment}, tensors) == (
        contents(whole)[0] | {"general.alignment": alignment},
        contents(whole)[1],
    )
    assert llamacpp.load_error(tmp_path / "joined.gguf") is None


def test_a_checkpoint_becomes_a_set_in_one_pass(sound: Path, tmp_path: Path) -> None:
    options = MetaOptions(overrides=Overrides(context=64))
    llamatools.convert(TINY, tmp_path / "m.gguf", alignment=4096, options=options, split_size=3_000_000)
    llamatools.convert(tmp_path / "m-00002-of-00002.gguf", tmp_path / "joined.gguf")
    assert (tmp_path / "joined.gguf").read_bytes() == sound.read_bytes()


def test_what_fits_into_one_file_stays_one(sound: Path, tmp_path: Path) -> None:
    llamatools.convert(sound, tmp_path / "m.gguf", split_size=sound.stat().st_size)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == sound.read_bytes()


def test_sizes_that_cannot_be(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(said: str, size: int) -> None:
        with pytest.raises(UsageError, match=f"^--split-size: {said}. Choose a larger size$"):
            llamatools.convert(sound, tmp_path / "m.gguf", split_size=size)

    refuses(r"the header alone takes \d+ bytes, more than the 5000 of a file", 5000)
    refuses(r"tensor 'token_embd.weight' takes a file of 270336 bytes, more than 100000, and is not cut", 100_000)
    monkeypatch.setattr(plan, "MAX_SHARDS", 3)
    refuses("1500000 bytes a file make 4 files, where 3 can be counted", 1_500_000)
    with pytest.raises(UsageError, match="^--split-size: 0 bytes hold nothing$"):
        llamatools.convert(sound, tmp_path / "m.gguf", split_size=0)
    assert [_nbytes(text) for text in ("4096", "2k", "500M", "2G", "1T")] == [4096, 2000, 5 * 10**8, 2 * 10**9, 10**12]
    for text in ("", "G", "1.5G", "-1", "2GB", "²"):
        with pytest.raises(UsageError, match="is no number of bytes. Such as 2G, 500M or 4096"):
            _nbytes(text)


@pytest.mark.parametrize(
    ("option", "how"),
    [
        ("--verify-source", {"verify": True}),
        ("--tokenizer", {"options": MetaOptions(tokenizer=Path("t"))}),
        ("--pad-vocab", {"options": MetaOptions(pad_vocab=True)}),
        ("--context", {"options": MetaOptions(overrides=Overrides(context=1))}),
        ("--rope-theta", {"options": MetaOptions(overrides=Overrides(rope_theta=1.0))}),
        ("--rope-factor", {"options": MetaOptions(overrides=Overrides(rope_factor=1.0))}),
        ("--norm-eps", {"options": MetaOptions(overrides=Overrides(norm_eps=1.0))}),
        ("--instruct", {"options": MetaOptions(instruct=True)}),
        ("--chat-template", {"options": MetaOptions(chat_template="t")}),
    ],
)
def test_options_of_a_checkpoint_are_refused(option: str, how: dict[str, Any], sound: Path, tmp_path: Path) -> None:
    said = f"^{option}: this is for a Meta checkpoint; a GGUF file keeps what it says. --set KEY=VALUE changes a key$"
    with pytest.raises(UsageError, match=said):
        llamatools.convert(sound, tmp_path / "m.gguf", **how)


def test_dtypes_are_not_changed_here(sound: Path, tmp_path: Path) -> None:
    for dtype in ("f16", "q4_k_m"):
        with pytest.raises(
            UsageError, match="--dtype: a GGUF file is laid out anew with the dtypes that it has. `llam"
        ):
            llamatools.convert(sound, tmp_path / "m.gguf", dtype=dtype)


def test_other_formats_are_not_converted(tmp_path: Path) -> None:
    for source, format in (
        (TINY / "consolidated.00.pth", "torch zip"),
        (write_hf(tmp_path / "hf", state_of()), "Hugging Face"),
        (tmp_path / "hf" / "model.safetensors", "safetensors"),
    ):
        with pytest.raises(UnsupportedError) as error:
            llamatools.convert(source, tmp_path / "m.gguf")
        assert str(error.value) == (
            f"{source}: this is {format}, and only Meta checkpoints and GGUF files are converted. Name a GGUF file, or "
            "the folder that holds params.json and consolidated.00.pth"
        )
    assert not (tmp_path / "m.gguf").exists()


def test_keys_are_set(sound: Path, tmp_path: Path) -> None:
    llamatools.convert(sound, tmp_path / "m.gguf", name="Mine", settings={"llama.context_length": "32"})
    keys, tensors = contents(tmp_path / "m.gguf")
    assert (keys["general.name"], keys["llama.context_length"]) == ("Mine", 32)
    assert tensors == contents(sound)[1]


@pytest.mark.parametrize("force", [False, True])
def test_a_set_appears_whole_or_not_at_all(force: bool, tmp_path: Path) -> None:
    """The second file cannot be named: the first is taken back, and what it replaced is there again."""
    first, second = tmp_path / "first", tmp_path / "second"
    if force:
        first.write_bytes(b"old")
    with pytest.raises((UsageError, FormatError)):
        with Drafts([(first, 3), (second, 3)], force=force) as drafts:
            drafts[0].write(b"new", 0)
            drafts[1].write(b"new", 0)
            second.mkdir() if force else second.write_bytes(b"theirs")
            drafts.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == (["first", "second"] if force else ["second"])
    assert not force or first.read_bytes() == b"old"


def test_too_little_disk_for_all_of_a_set_is_said_before_the_work(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    half = free.f_bavail * free.f_frsize * 3 // 4
    said = rf"first: needs {2 * half} bytes of disk, but only \d+ are free. Make room first"
    with pytest.raises(SpaceError, match=said):
        Drafts([(tmp_path / "first", half), (tmp_path / "second", half)]).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_set_replaces_another(tmp_path: Path) -> None:
    (tmp_path / "first").write_bytes(b"old")
    with Drafts([(tmp_path / "first", 3), (tmp_path / "second", 3)], force=True) as drafts:
        drafts[0].write(b"new", 0)
        drafts.publish()
    assert (tmp_path / "first").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_the_page_for_refused_files(sound: Path, tmp_path: Path) -> None:
    """Its commands, one after the other, on files such as it speaks of."""
    copied(sound, tmp_path / "broken.gguf")
    tensor = llamatools.inspect(sound).tensors[-1]
    data = sound.read_bytes()
    written(tmp_path / "merged.gguf", data[: tensor.offset] + bytes(tensor.nbytes) + data[tensor.end :])
    llamatools.convert(sound, tmp_path / "model.gguf", split_size=2_000_000)
    codes, said = [], ""
    for arguments in examples(ROOT / "docs" / "how-to" / "refused.md"):
        done = subprocess.run(
            [sys.executable, "-m", "llamatools", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        codes.append(done.returncode)
        said += done.stdout + done.stderr
    assert codes == [1, 0, 0, 1, 3, 0, 0]
    for block in re.findall(r"```\n(error .*?)```", (ROOT / "docs" / "how-to" / "refused.md").read_text(), re.S):
        assert block in said
    assert said.count("verdict     sound") == 1
    assert (tmp_path / "joined.gguf").read_bytes() == data
    assert len(list(tmp_path.glob("parts-0000?-of-00003.gguf"))) == 3
