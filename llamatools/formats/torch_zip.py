"""The zip container that torch.save writes: where each record's bytes lie, strictly.

    local header 30 bytes, name, extra (padding), data, data descriptor      for each record
    central header 46 bytes, name, extra (zip64)                             for each record
    zip64 end record 56 bytes, zip64 locator 20 bytes                        where sizes need them, in torch always
    end record 22 bytes                                                      the last of the file

Every record is stored as it is, inside one top folder whose name does not matter. Sizes come from the central
directory: torch leaves them zero in local headers (flag 0x0008). The data follow the local header, whose extra field is
longer than the central one, since it pads the data to a multiple of 64. (PKWARE's APPNOTE.TXT, 4.3 to 4.5.)

Zip readers that disagree about one file are how malice passes scanners, so whatever torch does not write is refused.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import FormatError, UnsupportedError, in_file
from ..tensors import SourceFile

LOCAL = struct.Struct("<4sHHHHHIIIHH")  # signature, version, flags, method, time, date, crc, sizes, lengths
CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
ZIP64_END = struct.Struct("<4sQHHIIQQQQ")
ZIP64_LOCATOR = struct.Struct("<4sIQI")
END = struct.Struct("<4sHHHHIIH")

ENCRYPTED = 0x2041  # the flags of plain encryption, strong encryption, masked headers
KNOWN_FLAGS = 0x0808  # sizes follow the data; names are UTF-8
SIZES_FOLLOW = 0x0008
ZIP64_EXTRA = 1
SATURATED_16, SATURATED_32 = 0xFFFF, 0xFFFFFFFF  # "see the zip64 field"
MAX_DIRECTORY = 64 << 20  # bytes; some 700,000 records
CHUNK = 4 << 20  # bytes read at once to verify

# Records of a TorchScript archive, which is such a zip too, of code.
TORCHSCRIPT = re.compile(r"[^/]*/(?:constants\.pkl|attributes\.pkl|code/.*|constants/.*|.*\.debug_pkl)")

DAMAGED = "The file is damaged or was not written by torch.save"


class Record(NamedTuple):
    """offset: of the data, in bytes from the start of the file. crc: CRC-32, 0 where torch was told to compute none."""

    offset: int
    size: int
    crc: int


class _Entry(NamedTuple):
    """A central header, with zip64 values in place."""

    name: str
    raw_name: bytes
    header: int  # offset of the local header
    flags: int
    size: int
    crc: int


class TruncatedError(FormatError):
    """The zip breaks off before its directory, so that where its records lie is unknown."""


def read_records(file: SourceFile) -> dict[str, Record]:
    """The records by their name inside the top folder, in the directory's order; none of their data is read.

    Raises FormatError for everything that torch.save does not write (TruncatedError where the end is missing),
    UnsupportedError for compressed records and TorchScript archives.
    """
    with in_file(file.path):
        directory, start, n_entries = _read_directory(file)
        entries = list(_entries(directory))
        if len(entries) != n_entries:
            raise FormatError(
                f"the zip directory lists {len(entries)} records, but announces {n_entries}", todo=DAMAGED
            )
        offsets = _data_offsets(file, entries, start)
        top = entries[0].name.partition("/")[0] if entries else ""
        records: dict[str, Record] = {}
        for entry in entries:
            name = _inside(top, entry.name)
            if name in records:
                raise FormatError("is listed twice", where=f"record {name!r}", todo=DAMAGED)
            records[name] = Record(offsets[entry.header], entry.size, entry.crc)
        return records


def first_data_offset(file: SourceFile, name: str) -> int:
    """Where the data of the file's first record begin, for a file without a directory.

    Raises FormatError unless it is called `name` in a top folder.
    """
    if file.size >= LOCAL.size:
        signature, *_, name_length, extra_length = LOCAL.unpack(read(file, 0, LOCAL.size))
        offset = LOCAL.size + int(name_length) + int(extra_length)
        if signature == b"PK\x03\x04" and offset <= file.size:
            path = read(file, LOCAL.size, name_length).decode("utf-8", "surrogateescape")
            if path.partition("/")[2] == name:
                return offset
    raise FormatError(f"its first record is not {name!r}", todo=DAMAGED)


def read(file: SourceFile, offset: int, n: int) -> bytes:
    """n bytes from `offset` on. Raises FormatError where the file has become shorter."""
    data = bytearray(n)
    file.read_into(memoryview(data), offset)
    return bytes(data)


def verify_crc(path: Path, progress: Callable[[int], object] | None = None) -> None:
    """Reads every record and compares its CRC-32. progress is told of bytes read.

    Raises FormatError naming the first record that differs, UnsupportedError where torch computed no sums.
    """
    with in_file(path):
        file = SourceFile(path, path.stat().st_size)
        try:
            records = read_records(file)
            if not any(record.crc for record in records.values()):
                raise UnsupportedError("torch was told to save no checksums, so there is nothing to verify it by")
            buffer = memoryview(bytearray(CHUNK))
            for name, record in records.items():
                crc = 0
                for done in range(0, record.size, CHUNK):
                    chunk = buffer[: min(CHUNK, record.size - done)]
                    file.read_into(chunk, record.offset + done)
                    crc = zlib.crc32(chunk, crc)
                    if progress is not None:
                        progress(len(chunk))
                check_crc(name, record, crc)
        finally:
            file.close()


def check_crc(name: str, record: Record, crc: int) -> None:
    """Raises FormatError unless `crc` is the record's."""
    if crc != record.crc:
        raise FormatError(
            f"its CRC-32 is {crc:08x}, but the zip directory says {record.crc:08x}",
            where=f"record {name!r}",
            todo="Its bytes changed since it was saved; copy or download the file again",
        )


def _read_directory(file: SourceFile) -> tuple[memoryview, int, int]:
    """The central directory, its offset, and how many records it announces."""
    end_at = file.size - END.size
    if end_at < 0 or read(file, end_at, 4) != b"PK\x05\x06":
        raise _without_end(file)
    _, disk, first_disk, here, n_entries, size, start, comment = END.unpack(read(file, end_at, END.size))
    if comment:
        raise FormatError(f"its end record announces a comment of {comment} bytes at the end of the file", todo=DAMAGED)
    numbers: tuple[int, ...] = (disk, first_disk, here, n_entries, size, start)
    located_at = end_at - ZIP64_LOCATOR.size
    if located_at >= 0 and read(file, located_at, 4) == b"PK\x06\x07":
        numbers = _zip64_end(file, located_at, numbers)
        end_at = located_at - ZIP64_END.size
    disk, first_disk, here, n_entries, size, start = numbers
    if disk or first_disk or here != n_entries:
        raise FormatError(f"a zip of several disks: this is disk {disk}, with {here} of {n_entries} records")
    if start + size != end_at:
        raise FormatError(
            f"the zip directory is said to be bytes {start} to {start + size}, but it ends at byte {end_at}",
            todo=DAMAGED,
        )
    if size > MAX_DIRECTORY:
        raise FormatError(f"a zip directory of {size} bytes; at most {MAX_DIRECTORY} are read")
    return memoryview(read(file, start, size)), start, n_entries


def _zip64_end(file: SourceFile, located_at: int, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The end record's numbers, from the zip64 record that the locator at `located_at` points to."""
    _, disk, at, n_disks = ZIP64_LOCATOR.unpack(read(file, located_at, ZIP64_LOCATOR.size))
    expected = located_at - ZIP64_END.size
    if disk or n_disks != 1 or at != expected:
        raise FormatError(f"its zip64 record should be at byte {expected} of disk 0 of 1, not {at}", todo=DAMAGED)
    signature, length, _, _, *wide = ZIP64_END.unpack(read(file, at, ZIP64_END.size))
    if signature != b"PK\x06\x06" or length != ZIP64_END.size - 12:
        raise FormatError(f"no zip64 record of {ZIP64_END.size} bytes at byte {at}", todo=DAMAGED)
    for narrow, full, saturated in zip(numbers, wide, (SATURATED_16,) * 4 + (SATURATED_32,) * 2, strict=True):
        if narrow not in (full, saturated):
            raise FormatError(f"its two end records disagree: {narrow} and {full}", todo=DAMAGED)
    return tuple(wide)


def _without_end(file: SourceFile) -> FormatError:
    """Why a zip does not end with its end record."""
    start = max(file.size - END.size - 0xFFFF, 0)
    tail = read(file, start, file.size - start)
    found = tail.rfind(b"PK\x05\x06")
    if 0 <= found <= len(tail) - END.size:
        at = start + found
        after = file.size - at - END.size
        return FormatError(f"{after} bytes follow the zip's end record at byte {at}", todo=DAMAGED)
    return TruncatedError(
        f"the zip directory that should end it is missing: the file breaks off at byte {file.size}",
        todo="The file is probably truncated; copy or download it again",
    )


def _central_headers(directory: memoryview) -> Iterator[tuple[tuple[int, ...], bytes, bytes]]:
    """The numbers, the name and the extra field of each central header."""
    at = 0
    while at < len(directory):
        if len(directory) - at < CENTRAL.size:
            raise FormatError(f"the zip directory breaks off in the header at its byte {at}", todo=DAMAGED)
        signature, *numbers = CENTRAL.unpack_from(directory, at)
        name_at = at + CENTRAL.size
        extra_at = name_at + numbers[9]
        comment_at = extra_at + numbers[10]
        end = comment_at + numbers[11]
        if signature != b"PK\x01\x02" or end > len(directory):
            raise FormatError(f"no whole header at byte {at} of the zip directory", todo=DAMAGED)
        yield tuple(numbers), bytes(directory[name_at:extra_at]), bytes(directory[extra_at:comment_at])
        at = end


def _entries(directory: memoryview) -> Iterator[_Entry]:
    for numbers, raw_name, extra in _central_headers(directory):
        _, _, flags, method, _, _, crc, packed, size, _, _, comment, disk, _, _, header = numbers
        name = raw_name.decode("utf-8", "surrogateescape")
        where = f"record {name!r}"
        if TORCHSCRIPT.fullmatch(name):
            raise UnsupportedError(
                "belongs to a TorchScript archive, which is a program",
                where=where,
                todo="Save the model's state_dict()",
            )
        if flags & ENCRYPTED:
            raise FormatError("is encrypted", where=where, todo="Decrypt the file first")
        if method:
            raise UnsupportedError(
                f"is compressed (method {method})",
                where=where,
                todo="Unpack the zip and pack it again without compression, or save the checkpoint again",
            )
        if flags & ~KNOWN_FLAGS:
            raise FormatError(f"has zip flags 0x{flags:04x}, of which 0x{KNOWN_FLAGS:04x} are known", where=where)
        if comment:
            raise FormatError(f"has a comment of {comment} bytes", where=where, todo=DAMAGED)
        size, packed, header = _widened((size, packed, header), extra, where)
        if disk:
            raise FormatError(f"lies on disk {disk} of a zip of several disks", where=where)
        if size != packed:
            raise FormatError(f"takes {packed} bytes, but is said to be {size} bytes long", where=where, todo=DAMAGED)
        yield _Entry(name, raw_name, header, flags, size, crc)


def _widened(numbers: tuple[int, ...], extra: bytes, where: str) -> tuple[int, ...]:
    """`numbers` of 32 bits, where those that are saturated come in order from the extra field's zip64 part."""
    if SATURATED_32 not in numbers:
        return numbers
    wide: list[int] = []
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == ZIP64_EXTRA:
            field = extra[at + 4 : at + 4 + length]
            wide = [number for (number,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            break
        at += 4 + length
    if len(wide) < numbers.count(SATURATED_32):
        raise FormatError("its zip64 field is missing or too short", where=where, todo=DAMAGED)
    next_wide = iter(wide)
    return tuple(next(next_wide) if number == SATURATED_32 else number for number in numbers)


def _data_offsets(file: SourceFile, entries: list[_Entry], end: int) -> dict[int, int]:
    """Where the data of each record begin, by the offset of its local header; all must lie apart, and before `end`."""
    offsets = {}
    ordered = sorted(entries, key=lambda entry: entry.header)
    limits = [*(entry.header for entry in ordered), end][1:]
    for entry, limit in zip(ordered, limits, strict=True):
        where = f"record {entry.name!r}"
        offset = entry.header + LOCAL.size + len(entry.raw_name)
        if offset <= limit:
            offset += _check_local(read(file, entry.header, offset - entry.header), entry, file, where)
        if offset + entry.size > limit:
            raise FormatError(
                f"its {entry.size} bytes from {offset} on reach into what begins at byte {limit}",
                where=where,
                todo=DAMAGED,
            )
        offsets[entry.header] = offset
    return offsets


def _check_local(header: bytes, entry: _Entry, file: SourceFile, where: str) -> int:
    """The length of the extra field of a local header (given with its name), which must agree with the central one."""
    signature, _, flags, method, _, _, crc, packed, size, name_length, extra_length = LOCAL.unpack_from(header)
    if signature != b"PK\x03\x04":
        raise FormatError(f"no local header at byte {entry.header}", where=where, todo=DAMAGED)
    if name_length != len(entry.raw_name) or header[LOCAL.size :] != entry.raw_name:
        local = header[LOCAL.size : LOCAL.size + name_length].decode("utf-8", "surrogateescape")
        raise FormatError(f"its local header calls it {local!r}", where=where, todo=DAMAGED)
    if (flags, method) != (entry.flags, 0):
        raise FormatError("its local header has other flags or another method", where=where, todo=DAMAGED)
    if SATURATED_32 in (packed, size):
        extra = read(file, entry.header + len(header), min(extra_length, file.size - entry.header - len(header)))
        packed, size = _widened((size, packed), extra, where)
    for local, central in ((crc, entry.crc), (packed, entry.size), (size, entry.size)):
        if local != central and not (flags & SIZES_FOLLOW and local == 0):
            raise FormatError(
                f"its local header gives its size or CRC-32 as {local}, the zip directory as {central}",
                where=where,
                todo=DAMAGED,
            )
    return int(extra_length)


def _inside(top: str, path: str) -> str:
    """The name of a record inside the top folder. Raises FormatError for any other path."""
    folder, _, name = path.partition("/")
    if not folder or folder != top:
        raise FormatError(f"is outside of the top folder {top!r}", where=f"record {path!r}", todo=DAMAGED)
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in name.split("/")):
        raise FormatError("has a name that is no path inside the top folder", where=f"record {path!r}", todo=DAMAGED)
    return name
