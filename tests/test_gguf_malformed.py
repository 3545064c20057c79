"""The hand-made files of llama.cpp's own suite (tests/test-gguf.cpp), by their names there, and some more.

Files of TENSORS_* end after their header. llama.cpp itself judges every file beside us.
"""

from __future__ import annotations

import random
import re
import struct
from pathlib import Path

import pytest
from gguf_files import (
    I32,
    STRING,
    U8,
    U32,
    Tensor,
    array,
    build,
    key,
    llamacpp_accepts,
    scalar,
    some_keys,
    some_tensors,
)

from llamatools.errors import FormatError, LlamatoolsError, UnsupportedError
from llamatools.formats import gguf
from llamatools.formats.gguf import read_gguf

BIG = 2**64 - 1
KEYS, TENSORS = some_keys(), some_tensors()
HERE, GONE = Tensor("here"), "The file is probably truncated"
DAMAGED = "The file is damaged or truncated"
ANEW = "Make or download the file again"
READ = "Versions 2 and 3 are read, little-endian"


def aligned(kind: int, value: int) -> bytes:
    return key("general.alignment", scalar(kind, value))


# name: file, what is said of it
REFUSED: dict[str, tuple[bytes, str]] = {
    "HEADER_BAD_MAGIC": (build(magic=b"FUGG"), "no GGUF file: it begins with b'FUGG'"),
    "HEADER_BAD_VERSION_0": (build(version=0), f"GGUF version 0, which never was. {READ}"),
    "HEADER_BAD_VERSION_1": (build(version=1), f"GGUF version 1. {READ}"),
    "HEADER_BAD_VERSION_FUTURE": (build(version=4), f"GGUF version 4. {READ}"),
    "HEADER_BIG_ENDIAN": (build(version=3 << 24), f"a big-endian GGUF file of version 3. {READ}"),
    "HEADER_BAD_N_TENSORS": (
        build(n_tensors=BIG),
        f"header: {BIG} tensors of 24 bytes or more are announced, but at most 8 bytes can follow. {DAMAGED}",
    ),
    "HEADER_BAD_N_KV": (
        build(n_keys=BIG),
        f"header: {BIG} keys of 14 bytes or more are announced, but at most 8 bytes can follow. {DAMAGED}",
    ),
    "KV_BAD_KEY_SIZE": (
        build([struct.pack("<Q", BIG) + b"my_key" + scalar(U32, 7)]),
        f"key 0: bytes 32 to {BIG + 32} are needed, but the file ends at 64. {GONE}",
    ),
    "KV_EMPTY_KEY": (build([*KEYS, key("", scalar(U32, 7))]), "key 24: it has no name"),
    "KV_BAD_TYPE": (
        build([key("my_key", struct.pack("<IB", 13, 0))]),
        "key 'my_key': value type 13, where 0 to 12 are known",
    ),
    "KV_BAD_ITEM_TYPE": (
        build([key("my_key", struct.pack("<IIQ", 9, 13, 0))]),
        "key 'my_key': value type 13, where 0 to 12 are known",
    ),
    "KV_ARRAY_OF_ARRAYS": (
        build([key("my_key", struct.pack("<IIQ", 9, 9, 1) + array(U8, [1])[4:])]),
        "key 'my_key': an array of arrays, which llama.cpp does not read either",
    ),
    "KV_BAD_VALUE_SIZE": (
        build([key("my_key", struct.pack("<IQ", STRING, 2**41) + b"short")]),
        f"key 'my_key': bytes 50 to {50 + 2**41} are needed, but the file ends at 64. {GONE}",
    ),
    "KV_BAD_ARRAY_SIZE": (
        build([key("my_key", struct.pack("<IIQ", 9, U32, 2**40) + b"short")]),
        f"key 'my_key': bytes 54 to {54 + 2**42} are needed, but the file ends at 64. {GONE}",
    ),
    "KV_BAD_STRINGS_SIZE": (
        build([key("my_key", struct.pack("<IIQ", 9, STRING, 2**60) + b"short")]),
        f"key 'my_key': {2**60} strings of 8 bytes or more are announced, but at most 10 bytes can follow. {DAMAGED}",
    ),
    "KV_DUPLICATE_KEY": (build([*KEYS, KEYS[3]]), "key 'my_array_1': it stands twice in the file"),
    "KV_BAD_ALIGN": (build([aligned(U32, 13)]), "key 'general.alignment': 13 is no power of two"),
    "KV_ZERO_ALIGN": (build([aligned(U32, 0)]), "key 'general.alignment': 0 is no power of two"),
    "KV_WRONG_TYPE_ALIGN": (build([aligned(I32, 32)]), "key 'general.alignment': int32 where uint32 is required"),
    "TENSORS_BAD_NAME_SIZE": (
        build(tensors=[HERE, Tensor("n" * 64)], data=False),
        "tensor 1: a name of 64 bytes, where 63 are allowed",
    ),
    "TENSORS_BAD_N_DIMS": (
        build(tensors=[Tensor("my_tensor", ne=(1, 1, 1, 1, 1))], data=False),
        "tensor 'my_tensor': 5 axes, where 4 are allowed",
    ),
    "TENSORS_BAD_SHAPE": (
        build(tensors=[Tensor("my_tensor", ne=(BIG, BIG))], data=False),
        f"tensor 'my_tensor': F32 [{BIG}, {BIG}] takes {4 * BIG**2} bytes, where {2**63 - 1} can be counted",
    ),
    "TENSORS_NE_TOO_BIG": (
        build(tensors=[Tensor("my_tensor", 24, ne=(4 * (2**31 - 1),) * 2)], data=False),
        f"takes {(4 * (2**31 - 1)) ** 2} bytes, where {2**63 - 1} can be counted",
    ),
    "TENSORS_NE_TOO_BIG_BUT_FOR_A_ZERO": (
        build(tensors=[Tensor("my_tensor", 24, ne=(2**62, 2**62, 0))], data=False),
        f"I8 [0, {2**62}, {2**62}] takes {2**124} bytes, where {2**63 - 1} can be counted",
    ),
    "TENSORS_NBYTES_TOO_BIG": (
        build(tensors=[Tensor("my_tensor", 27, ne=(1533916891, 1533916891))], data=False),
        f"I64 [1533916891, 1533916891] takes {8 * 1533916891**2} bytes, where {2**63 - 1} can be counted",
    ),
    "TENSORS_NBYTES_PAD_WRAP": (
        build(tensors=[Tensor("my_tensor", 0, ne=(4, 2**30 - 1, 2**30 + 1))], data=False),
        f"takes {2**64 - 16} bytes, where {2**63 - 1} can be counted",
    ),
    "TENSORS_BAD_TYPE": (
        build(tensors=[Tensor("my_tensor", 43)], data=False),
        "tensor 'my_tensor': weights of ggml's type 43, which is unknown",
    ),
    "TENSORS_REMOVED_TYPE": (
        build(tensors=[Tensor("my_tensor", 4)], data=False),
        "tensor 'my_tensor': weights of ggml's type 4, which ggml has given up",
    ),
    "TENSORS_BAD_ROWS": (
        build(tensors=[Tensor("my_tensor", 12, ne=(100, 4))], data=False),
        "tensor 'my_tensor': rows of 100 weights do not divide into Q4_K blocks of 256",
    ),
    "TENSORS_BAD_OFFSET": (
        build(tensors=[HERE, Tensor("my_tensor", offset=BIG)], data=False),
        f"tensor 'my_tensor': its data begin at byte {128 + BIG}, but tensor 'here' ends at 256, which padded to 32 is "
        f"256: a hole of {BIG - 128} bytes. {ANEW}",
    ),
    "TENSORS_DUPLICATE_NAME": (build(tensors=[HERE, HERE], data=False), "tensor 'here': two tensors have this name"),
    "TENSORS_BAD_ALIGN": (build([aligned(U32, 13)], TENSORS, alignment=13, data=False), "13 is no power of two"),
    "TENSORS_INCONSISTENT_ALIGN": (
        build(tensors=[Tensor("first", 24, (5,)), Tensor("my_tensor", 24, (5,), offset=5)], data=False),
        "key 'general.alignment': the tensors' offsets are the running sum for 1, but general.alignment is not "
        f"stated, which means 32. {ANEW}",
    ),
    "DATA_NOT_ENOUGH_DATA": (
        build(tensors=[HERE, Tensor("my_tensor")], cut=1),
        "tensor 'my_tensor': its data is bytes 256 to 384, but the file ends at 383: 1 bytes of 1 tensor are missing. "
        f"{GONE}",
    ),
    "DATA_BAD_ALIGN": (build([aligned(U32, 13)], TENSORS, alignment=13), "13 is no power of two"),
    "DATA_INCONSISTENT_ALIGN": (
        build(tensors=[Tensor("first", 24, (5,)), Tensor("my_tensor", 24, (5,), offset=5)]),
        "key 'general.alignment': the tensors' offsets are the running sum for 1, but general.alignment is not "
        f"stated, which means 32. {ANEW}",
    ),
    "DATA_MEM_SIZE_OVERFLOW": (
        build(tensors=[Tensor("first", 24, (2**63 - 64,)), Tensor("second", 24, (2**63 - 64,))], data=False)
        + bytes(32),
        f"tensor 'first': its data is bytes 128 to {128 + 2**63 - 64}, but the file ends at 160: "
        f"{2**64 - 160} bytes of 2 tensors are missing. {GONE}",
    ),
}

ACCEPTED: dict[str, bytes] = {
    "HEADER_EMPTY": build(),
    "KV_SUCCESS": build(KEYS),
    "TENSORS_ZERO_DIM": build(KEYS, [Tensor("my_tensor", ne=(256, 0))], data=False),
    "TENSORS_SUCCESS": build(KEYS, TENSORS, data=False),
    "TENSORS_CUSTOM_ALIGN": build([*KEYS, aligned(U32, 1)], TENSORS, alignment=1, data=False),
    "DATA_SUCCESS": build(KEYS, TENSORS),
    "DATA_CUSTOM_ALIGN": build([*KEYS, aligned(U32, 1)], TENSORS, alignment=1),
}

UNSUPPORTED = {
    "HEADER_BAD_VERSION_1", "HEADER_BAD_VERSION_FUTURE", "HEADER_BIG_ENDIAN", "TENSORS_BAD_TYPE", "TENSORS_REMOVED_TYPE"
}  # fmt: skip


def is_header_only(name: str) -> bool:
    return name.startswith("TENSORS_")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    data, said = REFUSED[name]
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(data)
    kind = UnsupportedError if name in UNSUPPORTED else FormatError
    with pytest.raises(kind, match=re.escape(said) + "$") as error:
        read_gguf(path, header_only=is_header_only(name))
    assert type(error.value) is kind
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(ACCEPTED[name])
    layout = read_gguf(path, header_only=is_header_only(name))
    if is_header_only(name) and layout.tensors[0].nbytes:
        with pytest.raises(FormatError, match=r"its data is bytes \d+ to \d+, but the file ends at \d+"):
            read_gguf(path)


@pytest.mark.parametrize("with_data", [False, True], ids=["header", "data"])
def test_llamacpp_agrees(with_data: bool, tmp_path: Path) -> None:
    cases = {name: data for name, (data, _) in REFUSED.items()} | ACCEPTED
    cases = {name: data for name, data in cases.items() if name.startswith("DATA_") is with_data}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    assert llamacpp_accepts(tmp_path, with_data=with_data) == {name: name in ACCEPTED for name in cases}


def test_a_file_may_lack_the_padding_after_its_last_tensor(tmp_path: Path) -> None:
    path = tmp_path / "unpadded.gguf"
    path.write_bytes(build(tensors=[HERE, Tensor("last", 24, (5,))], cut=27))
    assert read_gguf(path).tensors[-1].end == path.stat().st_size
    assert llamacpp_accepts(tmp_path) == {"unpadded.gguf": True}


def test_counts_that_the_file_could_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_COUNT", 3)
    path = tmp_path / "model.gguf"
    for data, said in (
        (build([key(f"k{n}", scalar(U8, 0)) for n in range(4)]), "header: 4 keys are announced, where 3 are allowed"),
        (build(tensors=[Tensor(f"t{n}") for n in range(4)]), "header: 4 tensors are announced, where 3 are allowed"),
    ):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=said):
            read_gguf(path)


SMALL_PARTS = (
    [aligned(U32, 64), *some_keys(1)[-6:]],
    [HERE, Tensor("quantized", 2, (64, 3)), Tensor("last", 24, (5,))],
)
SMALL = build(*SMALL_PARTS, alignment=64)


def test_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(SMALL)
    tensors = [(t.name, t.dtype, t.shape, t.offset) for t in read_gguf(path).tensors]
    header_end = len(build(*SMALL_PARTS, alignment=1, data=False))
    data_end = read_gguf(path).tensors[-1].end
    assert header_end < data_end < len(SMALL)
    for size in range(len(SMALL)):
        path.write_bytes(SMALL[:size])
        for header_only, needed in ((True, header_end), (False, data_end)):
            if size < needed:
                with pytest.raises(
                    FormatError, match=r"ends at \d+[.:].* The file is prob|announced|is empty|begins with"
                ):
                    read_gguf(path, header_only=header_only)
            else:
                layout = read_gguf(path, header_only=header_only)
                assert [(t.name, t.dtype, t.shape, t.offset) for t in layout.tensors] == tensors


def test_what_is_accepted_after_damage_llamacpp_accepts(tmp_path: Path) -> None:
    draws = random.Random(5)
    seeds = [SMALL, ACCEPTED["DATA_SUCCESS"], build(tensors=TENSORS), build(KEYS[:6], [HERE], version=2)]
    folder = tmp_path / "accepted"
    folder.mkdir()
    n_accepted = 0
    for n in range(4000):
        data = bytearray(draws.choice(seeds))
        for _ in range(draws.choice((1, 1, 2, 4))):
            at = draws.randrange(min(len(data), 1400))
            kind = draws.randrange(4)
            if kind == 0:
                data[at] = draws.randrange(256)
            elif kind == 1:
                data[at] ^= 1 << draws.randrange(8)
            elif kind == 2:
                at -= at % 4
                data[at : at + 8] = struct.pack("<Q", draws.choice((0, 1, 2, 31, 255, 2**31, 2**32, 2**63, BIG)))
            else:
                del data[at : at + draws.randrange(1, 9)]
        path = folder / str(n)
        path.write_bytes(data)
        try:
            layout = read_gguf(path)
        except LlamatoolsError:
            path.unlink()
            continue
        n_accepted += 1
        for tensor in layout.tensors:
            assert tensor.source is not None
            tensor.source.read(0, tensor.source.n_rows)
    assert n_accepted > 400
    verdicts = llamacpp_accepts(folder)
    assert len(verdicts) == n_accepted
    assert all(verdicts.values())
