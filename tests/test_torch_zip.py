"""torch's zip container, against torch's own reader and Python's zipfile; and files edited byte by byte."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llamatools.errors import FormatError, LlamatoolsError, UnsupportedError
from llamatools.formats.torch_zip import MAX_DIRECTORY, Record, first_data_offset, read_records, verify_crc
from llamatools.tensors import SourceFile

# Offsets of fields in APPNOTE.TXT's structures, with their struct codes.
CENTRAL = {
    "flags": (8, "H"), "method": (10, "H"), "crc": (16, "I"), "packed": (20, "I"), "size": (24, "I"),
    "name_length": (28, "H"), "extra_length": (30, "H"), "comment_length": (32, "H"), "disk": (34, "H"),
    "header": (42, "I"),
}  # fmt: skip
LOCAL = {"signature": (0, "I"), "flags": (6, "H"), "crc": (14, "I"), "size": (22, "I"), "name_length": (26, "H")}
END = {
    "disk": (4, "H"),
    "here": (8, "H"),
    "all": (10, "H"),
    "size": (12, "I"),
    "start": (16, "I"),
    "comment": (20, "H"),
}


def saved() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.arange(50.0), "b": torch.arange(7), "empty": torch.zeros(0)}, file)
    return file.getvalue()


def packed(write: Callable[[zipfile.ZipFile], object], **options: int) -> bytes:
    """A zip that Python's zipfile wrote."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:  # type: ignore[call-overload]
        write(archive)
    return file.getvalue()


def records(data: bytes, folder: Path) -> dict[str, Record]:
    path = folder / "model.pth"
    path.write_bytes(data)
    return read_records(SourceFile(path, len(data)))


def refusal(data: bytes, folder: Path, kind: type[LlamatoolsError] = FormatError) -> str:
    with pytest.raises(kind) as error:
        records(data, folder)
    assert str(error.value).startswith(f"{folder / 'model.pth'}: ")
    return str(error.value).removeprefix(f"{folder / 'model.pth'}: ")


@contextmanager
def edits(data: bytes) -> Iterator[tuple[bytearray, Callable[..., None], int]]:
    """The bytes; set(record, **fields) of central headers, set(None, **fields) of the end; the directory's offset."""
    edited = bytearray(data)
    start = zipfile.ZipFile(io.BytesIO(data)).start_dir

    def set_(record: str | None, **fields: int) -> None:
        at, table = len(edited) - 22, END
        if record is not None:
            at, table = edited.index(record.encode(), start) - 46, CENTRAL
        for field, value in fields.items():
            struct.pack_into("<" + table[field][1], edited, at + table[field][0], value)

    yield edited, set_, start


def set_local(edited: bytearray, record: str, **fields: int) -> None:
    at = edited.index(record.encode()) - 30
    for field, value in fields.items():
        struct.pack_into("<" + LOCAL[field][1], edited, at + LOCAL[field][0], value)


def without_zip64(data: bytes) -> bytes:
    """torch always writes the zip64 end records; small files need none."""
    return data[: -22 - 20 - 56] + data[-22:]


def test_records_are_where_torch_finds_them(tmp_path: Path) -> None:
    data = saved()
    found = records(data, tmp_path)
    reader = torch._C.PyTorchFileReader(str(tmp_path / "model.pth"))
    assert list(found) == reader.get_all_records()
    for name, record in found.items():
        assert record.offset == reader.get_record_offset(name)
        assert data[record.offset : record.offset + record.size] == reader.get_record(name)
    for info in zipfile.ZipFile(io.BytesIO(data)).infolist():
        assert found[info.filename.partition("/")[2]][1:] == (info.file_size, info.CRC)
    assert records(without_zip64(data), tmp_path) == found


def test_zips_that_python_wrote_without_compression(tmp_path: Path) -> None:
    def write(archive: zipfile.ZipFile) -> None:
        archive.writestr("x/data.pkl", b"12345")
        with archive.open("x/data/0", "w", force_zip64=True) as record:  # sizes in the local header's zip64 field
            record.write(b"abc")

    data = packed(write)
    found = records(data, tmp_path)
    assert {name: data[r.offset : r.offset + r.size] for name, r in found.items()} == {
        "data.pkl": b"12345",
        "data/0": b"abc",
    }
    assert records(packed(lambda archive: None), tmp_path) == {}


def test_extra_fields_of_other_kinds_are_passed_over(tmp_path: Path) -> None:
    record = zipfile.ZipInfo("x/data.pkl")
    record.extra = b"FB\x03\x00ZZZ"
    data = bytearray(packed(lambda archive: archive.writestr(record, b"12345")))
    header = data.index(b"PK\x01\x02")
    zip64 = struct.pack("<HHQ", 1, 8, 5)
    data[header + 46 + 10 + 7 : header + 46 + 10 + 7] = zip64  # after the other field
    struct.pack_into("<I", data, header + 24, 0xFFFFFFFF)
    struct.pack_into("<H", data, header + 30, 7 + len(zip64))
    struct.pack_into("<I", data, len(data) - 10, 46 + 10 + 7 + len(zip64))
    assert records(bytes(data), tmp_path)["data.pkl"].size == 5
    with zipfile.ZipFile(tmp_path / "model.pth") as archive:
        assert archive.read("x/data.pkl") == b"12345"


def test_thousands_of_records(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({f"t{i}": torch.zeros(1) for i in range(3000)}, path)
    found = read_records(SourceFile(path, path.stat().st_size))
    reader = torch._C.PyTorchFileReader(str(path))
    assert len(found) == 3006
    assert all(record.offset == reader.get_record_offset(name) for name, record in found.items())


def test_sizes_and_offsets_beyond_4_gib(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with torch.serialization.skip_data():  # torch leaves holes where the data belong
        torch.save({"a": torch.empty(5 << 30, dtype=torch.uint8), "b": torch.ones(3)}, path)
    found = read_records(SourceFile(path, path.stat().st_size))
    reader = torch._C.PyTorchFileReader(str(path))
    assert {name: record.offset for name, record in found.items()} == {
        name: reader.get_record_offset(name) for name in reader.get_all_records()
    }
    assert found["data/0"].size == 5 << 30
    assert found["data/1"].offset > 5 << 30


def test_verify_reads_all_and_tells_of_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    data = saved()
    path.write_bytes(data)
    read: list[int] = []
    verify_crc(path, read.append)
    assert sum(read) == sum(info.file_size for info in zipfile.ZipFile(path).infolist())
    damaged = bytearray(data)
    damaged[records(data, tmp_path)["data/0"].offset + 9] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(FormatError, match=r"record 'data/0': its CRC-32 is \w{8}, but the zip directory says \w{8}\. "):
        verify_crc(path)


def test_verify_needs_checksums(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(
        UnsupportedError, match="torch was told to save no checksums, so there is nothing to verify it by"
    ):
        verify_crc(path)


def test_truncated(tmp_path: Path) -> None:
    data = saved()
    assert refusal(data[:1000], tmp_path) == (
        "the zip directory that should end it is missing: the file breaks off at byte 1000. "
        "The file is probably truncated; copy or download it again"
    )
    for n in range(22):
        assert f"breaks off at byte {n}." in refusal(data[:n], tmp_path)
    with pytest.raises(FormatError, match=r"its first record is not 'other\.pkl'"):
        records(data, tmp_path)
        first_data_offset(SourceFile(tmp_path / "model.pth", len(data)), "other.pkl")


def test_end_of_the_file(tmp_path: Path) -> None:
    data = without_zip64(saved())
    assert refusal(data + b"more", tmp_path).startswith(
        f"4 bytes follow the zip's end record at byte {len(data) - 22}."
    )
    commented = packed(lambda archive: setattr(archive, "comment", b"hello"))
    assert refusal(commented, tmp_path).startswith("5 bytes follow the zip's end record at byte 0.")
    with edits(data) as (edited, set_, start):
        set_(None, comment=9)
        assert "its end record announces a comment of 9 bytes" in refusal(edited, tmp_path)
    with edits(data) as (edited, set_, start):
        set_(None, disk=1)
        assert "a zip of several disks: this is disk 1, with 9 of 9 records" in refusal(edited, tmp_path)
    with edits(data) as (edited, set_, start):
        set_(None, start=start - 1)
        end = len(data) - 22
        assert f"directory is said to be bytes {start - 1} to {end - 1}, but it ends at byte {end}" in refusal(
            edited, tmp_path
        )
    with edits(data) as (edited, set_, start):
        set_(None, all=10, here=10)
        assert "the zip directory lists 9 records, but announces 10" in refusal(edited, tmp_path)


def test_zip64_end_records(tmp_path: Path) -> None:
    data = saved()
    locator, record = len(data) - 22 - 20, len(data) - 22 - 20 - 56
    for at, layout, value, message in (
        (
            locator + 8,
            "<Q",
            record - 1,
            f"its zip64 record should be at byte {record} of disk 0 of 1, not {record - 1}",
        ),
        (locator + 16, "<I", 2, "its zip64 record should be at byte"),
        (record, "<I", 0, f"no zip64 record of 56 bytes at byte {record}"),
        (record + 4, "<Q", 45, "no zip64 record of 56 bytes"),
        (record + 32, "<Q", 8, "its two end records disagree: 9 and 8"),
    ):
        edited = bytearray(data)
        struct.pack_into(layout, edited, at, value)
        assert message in refusal(edited, tmp_path)


def test_a_directory_larger_than_any(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    size = MAX_DIRECTORY + 1
    with open(path, "wb") as file:  # a hole
        file.seek(size)
        file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, size, 0, 0))
    with pytest.raises(FormatError, match=f"a zip directory of {size} bytes; at most {MAX_DIRECTORY} are read"):
        read_records(SourceFile(path, path.stat().st_size))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flags": 1}, "record 'archive/version': is encrypted. Decrypt the file first"),
        ({"flags": 0x0818}, "has zip flags 0x0818, of which 0x0808 are known"),
        ({"disk": 3}, "lies on disk 3 of a zip of several disks"),
        ({"size": 99}, "takes 2 bytes, but is said to be 99 bytes long"),
        ({"header": 0}, "reach into what begins at byte 0"),
        ({"header": 0xFFFFFFFF}, "its zip64 field is missing or too short"),
        ({"crc": 5}, "record 'archive/version'"),  # torch leaves the local CRC zero, so only reading finds this
        ({"name_length": 0xFFFF}, "of the zip directory"),
        ({"comment_length": 0xFFFF}, "of the zip directory"),
        ({"comment_length": 1}, "has a comment of 1 bytes"),
    ],
)
def test_central_headers(fields: dict[str, int], message: str, tmp_path: Path) -> None:
    with edits(saved()) as (edited, set_, _):
        set_("archive/version", **fields)
        if "crc" in fields:
            assert records(edited, tmp_path)["version"].crc == 5
            with pytest.raises(FormatError, match="its CRC-32 is 55679ed1, but the zip directory says 00000005"):
                verify_crc(tmp_path / "model.pth")
        else:
            assert message in refusal(edited, tmp_path)


def test_sizes_that_reach_into_other_records(tmp_path: Path) -> None:
    with edits(saved()) as (edited, set_, start):
        first = records(edited, tmp_path)["data/0"]
        set_("archive/data/0", size=5000, packed=5000)
        message = refusal(edited, tmp_path)
        assert message.startswith(
            f"record 'archive/data/0': its 5000 bytes from {first.offset} on reach into what begins"
        )
    with edits(saved()) as (edited, set_, start):
        set_("archive/.data/serialization_id", size=5000, packed=5000)
        assert f"reach into what begins at byte {start}" in refusal(edited, tmp_path)
    with edits(saved()) as (edited, set_, start):
        at = struct.unpack_from("<I", edited, edited.index(b"archive/version", start) - 4)[0] + 1
        set_("archive/version", header=at)
        assert f"record 'archive/version': no local header at byte {at}" in refusal(edited, tmp_path)
    with edits(saved()) as (edited, set_, start):
        set_("archive/data/0", size=0xFFFFFFF0, packed=0xFFFFFFF0)
        assert "reach into" in refusal(edited, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"signature": 7}, "no local header at byte"),
        ({"name_length": 3}, "its local header calls it 'arc'"),
        ({"flags": 0}, "its local header has other flags or another method"),
        ({"crc": 77}, "its local header gives its size or CRC-32 as 77, the zip directory as "),
        ({"size": 77}, "its local header gives its size or CRC-32 as 77, the zip directory as 2"),
    ],
)
def test_local_headers(fields: dict[str, int], message: str, tmp_path: Path) -> None:
    edited = bytearray(saved())
    set_local(edited, "archive/version", **fields)
    assert message in refusal(edited, tmp_path)


def test_local_name_that_differs(tmp_path: Path) -> None:
    edited = bytearray(saved())
    edited[edited.index(b"archive/version")] ^= 1
    assert "record 'archive/version': its local header calls it '`rchive/version'" in refusal(edited, tmp_path)


def test_local_sizes_are_needed_where_none_follow(tmp_path: Path) -> None:
    edited = bytearray(packed(lambda archive: archive.writestr("x/data.pkl", b"12345")))
    set_local(edited, "x/data.pkl", size=0)
    assert "gives its size or CRC-32 as 0, the zip directory as 5" in refusal(edited, tmp_path)


@pytest.mark.parametrize(
    ("cut", "more", "message"),
    [
        (10, b"", "no whole header at byte"),
        (0, bytes(46), "no whole header at byte"),
        (0, bytes(10), "the zip directory breaks off in the header at its byte"),
    ],
)
def test_a_directory_that_breaks_off(cut: int, more: bytes, message: str, tmp_path: Path) -> None:
    data = without_zip64(saved())
    start = int.from_bytes(data[-6:-2], "little")
    directory = data[start : -22 - cut] + more
    edited = data[:start] + directory + data[-22:-10] + struct.pack("<IIH", len(directory), start, 0)
    assert message in refusal(edited, tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("x/data.pkl", "y/data/0"), "record 'y/data/0': is outside of the top folder 'x'"),
        (("data.pkl",), "record 'data.pkl': has a name that is no path inside the top folder"),
        (("/data.pkl",), "is outside of the top folder ''"),
        (("x/../data.pkl",), "no path inside"),
        (("x/data//0",), "no path inside"),
        (("x/data/",), "no path inside"),
        (("x/a\\b",), "no path inside"),
        (("x/data.pkl", "x/data.pkl"), "record 'data.pkl': is listed twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in refusal(packed(lambda archive: [archive.writestr(name, b"1") for name in names]), tmp_path)


def test_compressed(tmp_path: Path) -> None:
    data = packed(lambda archive: archive.writestr("x/data.pkl", bytes(100)), compression=zipfile.ZIP_DEFLATED)
    assert refusal(data, tmp_path, UnsupportedError) == (
        "record 'x/data.pkl': is compressed (method 8). "
        "Unpack the zip and pack it again without compression, or save the checkpoint again"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), file)
    assert "belongs to a TorchScript archive, which is a program. Save the model's state_dict() instead"[
        :-8
    ] in refusal(file.getvalue(), tmp_path, UnsupportedError)
