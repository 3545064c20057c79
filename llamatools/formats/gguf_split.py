"""GGUF models in several files: `NAME-00001-of-00003.gguf` and its siblings, each a whole GGUF file of its own.

Every shard says which it is (`split.no`, from 0), how many there are (`split.count`) and how many tensors all of them
have (`split.tensors.count`). The model's other keys stand in the first, which may have no tensors; offsets count in
each file for itself, by its own `general.alignment`, which every shard states that is written here. Source: llama.cpp,
tools/gguf-split and src/llama-model-loader.cpp.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import FormatError, Report, in_file, naming, refuse
from ..layout import Layout, PlacedTensor
from ..metadata import Kind, Metadata, Value, u32
from .gguf import read_gguf
from .gguf_write import ALIGNMENT_KEY

SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
NUMBER, COUNT, N_TENSORS = "split.no", "split.count", "split.tensors.count"
KINDS = {NUMBER: Kind.UINT16, COUNT: Kind.UINT16, N_TENSORS: Kind.INT32}
OWN = {NUMBER, ALIGNMENT_KEY}  # keys that each shard has for itself
SHOWN_NAMES = 5


def read_gguf_set(path: Path, *, report: Report = refuse) -> Layout:
    """The layout of a GGUF file, or of the whole set where it is one shard of several.

    Its metadata are the first shard's, with whatever keys only others have. report: is told what is wrong with the
    set and its files; unless it raises, the layout is of what is there.
    Raises what `read_gguf` raises, and FormatError for missing shards and for shards that do not belong together.
    """
    shard = read_gguf(path, report=report)
    try:
        with in_file(path):
            count = _number(shard.metadata, COUNT, 0)
            if count < 2:
                return shard
            paths = shard_paths(path, _number(shard.metadata, NUMBER), count)
    except FormatError as error:
        report(error)
        return shard
    missing = [sibling.name for sibling in paths if not sibling.is_file()]
    if missing:
        naming(path, report)(_missing(missing, count))
    shards: dict[Path, Layout] = {}
    for number, sibling in enumerate(paths):
        try:
            with in_file(sibling):
                if sibling.name not in missing:
                    shards[sibling] = shard if sibling == path else read_gguf(sibling, report=report)
                    _require_place(shards[sibling].metadata, number, count)
        except FormatError as error:
            report(error)
    return _joined(path, shards, None if missing else _number(shard.metadata, N_TENSORS, 0), report)


def shard_paths(path: Path, number: int, count: int) -> list[Path]:
    """Where all shards must be, told by the name of one. Raises FormatError for a name that does not tell."""
    parts = SHARD.fullmatch(path.name)
    if not parts or (int(parts[2]), int(parts[3])) != (number + 1, count):
        raise FormatError(
            f"it is shard {number + 1} of {count}, so its name must end in '-{number + 1:05}-of-{count:05}.gguf'",
            todo="Give all shards their names back, so that they can be found",
            code="shard-name",
        )
    return [path.with_name(shard_name(parts[1], n, count)) for n in range(count)]


def shard_name(prefix: str, number: int, count: int) -> str:
    """The name of shard `number`, from 0."""
    return f"{prefix}-{number + 1:05}-of-{count:05}.gguf"


def shard_keys(number: int, count: int, n_tensors: int, alignment: int) -> dict[str, Value]:
    """The keys that make a file shard `number`, from 0, of `count` with `n_tensors` tensors in all."""
    keys = {NUMBER: number, COUNT: count, N_TENSORS: n_tensors}
    return {key: Value(KINDS[key], value) for key, value in keys.items()} | {ALIGNMENT_KEY: u32(alignment)}


def _missing(names: list[str], count: int) -> FormatError:
    listed = ", ".join(names[:SHOWN_NAMES]) + (" and others" if len(names) > SHOWN_NAMES else "")
    return FormatError(
        f"{len(names)} of its {count} shards {'is' if len(names) == 1 else 'are'} missing: {listed}",
        todo="Put all shards into one folder",
        code="shard-missing",
    )


def _joined(path: Path, shards: dict[Path, Layout], n_tensors: int | None, report: Report) -> Layout:
    """The shards as one layout. n_tensors: how many they must have, None where that cannot be asked."""
    layouts = list(shards.values())
    first = layouts[0].files[0].path.name
    metadata: dict[str, Value] = {}
    tensors: list[PlacedTensor] = []
    holders: dict[str, str] = {}
    for n, (sibling, layout) in enumerate(shards.items()):
        tell = naming(sibling, report)
        for key, value in layout.metadata.items():
            if key not in OWN and not _same(metadata.get(key, value), value):
                what = f"not what {first} says"
                tell(FormatError(what, where=f"key {key!r}", todo="It is a shard of another model", code="shard-alien"))
            metadata.setdefault(key, value)
        for tensor in layout.tensors:
            other = holders.setdefault(tensor.name, sibling.name)
            if other != sibling.name:
                what = f"{other} has one of this name, too"
                tell(FormatError(what, where=f"tensor {tensor.name!r}", code="tensor-twice"))
            tensors.append(replace(tensor, file=n))
    if n_tensors not in (None, len(tensors)):
        what = f"{n_tensors}, but all shards together have {len(tensors)} tensors"
        naming(path, report)(FormatError(what, where=f"key {N_TENSORS!r}", code="shard-alien"))
    return replace(
        layouts[0],
        files=tuple(layout.files[0] for layout in layouts),
        tensors=tuple(tensors),
        metadata=metadata,
        alignment=min(layout.alignment or 1 for layout in layouts),
        header_end=None,
        data_offset=None,
        stopped_at=next((layout.stopped_at for layout in layouts if layout.stopped_at is not None), None),
    )


def _number(metadata: Metadata, key: str, default: int | None = None) -> int:
    value = metadata.get(key)
    where = f"key {key!r}"
    if value is None:
        if default is None:
            raise FormatError("required in every shard, but missing", where=where, code="key-missing")
        return default
    if value.kind is not KINDS[key]:
        raise FormatError(f"{value.kind} where {KINDS[key]} is required", where=where, code="key-type")
    return int(value.data)


def _require_place(metadata: Metadata, number: int, count: int) -> None:
    """A shard must be the one that its name says, of a set of that size."""
    for key, wanted in ((COUNT, count), (NUMBER, number)):
        found = _number(metadata, key)
        if found != wanted:
            what = f"{found}, where its name says {wanted}"
            raise FormatError(what, where=f"key {key!r}", todo="It was renamed", code="shard-name")


def _same(a: Value, b: Value) -> bool:
    return (a.kind, a.item) == (b.kind, b.item) and np.array_equal(a.data, b.data)
