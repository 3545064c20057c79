"""Typed metadata values, as GGUF has them: each key's value carries the type it is stored in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError


class Kind(IntEnum):
    """GGUF's value types, by their number in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Value:
    """A metadata value.

    kind: how it is stored.
    data: bool, int, float or str; for ARRAY a numpy array (numbers, bools) or a sequence of str.
    item: for ARRAY, the kind of its items.
    """

    kind: Kind
    data: Any
    item: Kind | None = None


Metadata = Mapping[str, Value]


def u32(value: int) -> Value:
    return Value(Kind.UINT32, value)


def f32(value: float) -> Value:
    return Value(Kind.FLOAT32, float(np.float32(value)))


def boolean(value: bool) -> Value:
    return Value(Kind.BOOL, value)


def string(value: str) -> Value:
    return Value(Kind.STRING, value)


def strings(values: Sequence[str]) -> Value:
    return Value(Kind.ARRAY, values, Kind.STRING)


def array(kind: Kind, values: NDArray[Any]) -> Value:
    return Value(Kind.ARRAY, values, kind)


# Keys that describe the file itself: setting them by hand would make it lie.
STRUCTURAL = re.compile(r"general\.(architecture|alignment|file_type|quantization_version)|llamatools\..*|split\..*")
INTEGERS = {kind: np.iinfo(kind.name.lower()) for kind in Kind if kind.name.removeprefix("U").startswith("INT")}


def parse_setting(key: str, text: str, present: Value | None) -> Value:
    """The value that a user's KEY=TEXT means.

    A key that is `present` keeps its kind. A new one is a string, unless the text begins with its kind, as in
    `uint32:7` or `bool:true`. Raises UsageError.
    """
    where = f"--set {key}"
    if STRUCTURAL.fullmatch(key) or (present and present.kind is Kind.ARRAY):
        raise UsageError("this key follows from the model and cannot be set", where=where)
    kind = present.kind if present else Kind.STRING
    prefix, colon, rest = text.partition(":")
    if not present and colon and prefix.upper() in Kind.__members__:
        kind, text = Kind[prefix.upper()], rest
    if kind is Kind.STRING:
        return string(text)
    try:
        if kind in INTEGERS:
            number = int(text)
            if INTEGERS[kind].min <= number <= INTEGERS[kind].max:
                return Value(kind, number)
        elif kind is Kind.BOOL:
            return boolean({"true": True, "false": False}[text.lower()])
        elif kind in (Kind.FLOAT32, Kind.FLOAT64):
            return f32(float(text)) if kind is Kind.FLOAT32 else Value(kind, float(text))
    except (ValueError, KeyError):
        pass
    raise UsageError(f"{text!r} is no {kind}", where=where)


ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads keys over all their bits


class Strings(Sequence[str]):
    """An array of strings that stay bytes in their buffer until asked for, since a vocabulary has 100,000 of them.

    buffer: the bytes; starts, ends: (n,) where each string lies in it. Bytes that are not UTF-8 become surrogates.
    as_in_gguf: whether buffer is the strings, each after its length, as GGUF has them, and nothing else.
    """

    def __init__(
        self,
        buffer: bytes | memoryview,
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        as_in_gguf: bool = False,
    ) -> None:
        self.buffer = buffer
        self.starts = starts
        self.ends = ends
        self.as_in_gguf = as_in_gguf

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return Strings(self.buffer, self.starts[index], self.ends[index])
        return bytes(self.buffer[self.starts[index] : self.ends[index]]).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            yield bytes(self.buffer[start:end]).decode("utf-8", "surrogateescape")

    def n_distinct(self) -> int:
        """How many different strings there are. Only those alike in length, first and last 8 bytes are decoded."""
        padded = b"".join((bytes(8), self.buffer, bytes(8)))
        words = np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,))  # the 8 bytes from each byte on
        lengths = self.ends - self.starts
        short = np.clip(8 - lengths, 0, 8).astype(np.uint64)  # bytes that are no part of a string of less than 8
        last = np.where(short < 8, words[self.ends] >> 8 * short << 8 * short, 0)
        first = np.where(lengths > 8, words[self.starts + 8], 0)
        keys = (last * ODD) ^ (first + lengths.astype(np.uint64) * ODD)  # equal for equal strings, rarely for others
        in_order = np.sort(keys)
        repeated = in_order[1:][in_order[1:] == in_order[:-1]]
        alike = np.flatnonzero(np.isin(keys, repeated)) if len(repeated) else repeated
        return len(self) - len(alike) + len({self[n] for n in alike.tolist()})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]
