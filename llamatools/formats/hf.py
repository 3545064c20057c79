"""A Hugging Face model folder: config.json, weights as safetensors in one file or many, and tokenizer files.

    model.safetensors                                     all weights, or
    model.safetensors.index.json                          {"weight_map": {tensor: file}, "metadata": {...}}
    model-00001-of-00003.safetensors ...                  the files that it names

The index must be right: every tensor in exactly the file that it names, and none that it does not name. Without
config.json the tensors are listed all the same. Names and row order of tensors are Hugging Face's. What of config.json
is no hyperparameter is metadata, as `config.<key>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint import Hyperparameters, Note, Tokenizer
from ..errors import FormatError, Report, UnsupportedError, in_file, naming, refuse
from ..layout import File, Layout
from ..metadata import Kind, Value, boolean, string
from ..tokenizers import hf_json, read_tokenizer
from . import hf_config, strict_json
from .safetensors import read_safetensors

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?")
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZERS = ("tokenizer.model", "tokenizer.json")  # in this order: the first holds scores, too
WEIGHTS_FILE = re.compile(r"[^/\\\0]+\.safetensors")  # a plain name: no folder, and no way out of this one
MAX_INDEX_NBYTES = 32 << 20
MAX_TOKENIZER_NBYTES = 64 << 20
SHOWN_NAMES = 5


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds a config.json or weights under the names that transformers gives them."""
    return any((path / name).exists() for name in (CONFIG, SINGLE, INDEX)) or bool(_pickled(path))


def is_index(head: bytes) -> bool:
    """Whether a file that begins so may be an index, to be named in place of its folder."""
    return head.lstrip(b" \t\r\n")[:1] == b"{"


def read_hf(path: Path, *, report: Report = refuse) -> Layout:
    """The layout of the model in the folder `path`; tensors in the order of files and of their bytes.

    report: is told what is wrong with the files; unless it raises, the layout is of what is there.
    Raises FormatError for files that are missing, damaged or contradict each other, UnsupportedError for weights in
    other containers.
    """
    with in_file(path):
        if (path / INDEX).is_file():
            return read_sharded(path / INDEX, report=report)
        if (path / SINGLE).is_file():
            return _described(path, read_safetensors(path / SINGLE, report=report), [], report)
        if pickled := _pickled(path):
            raise UnsupportedError(
                f"its weights are in {pickled[0]}, which holds a pickle",
                todo="Save them again with safe_serialization=True",
            )
        raise FormatError(f"no weights in it: neither {SINGLE} nor {INDEX}", todo="Download the folder again")


def read_sharded(path: Path, *, report: Report = refuse) -> Layout:
    """The layout of the model whose files the index at `path` names. Arguments and errors are those of `read_hf`."""
    folder, tell = path.parent, naming(path, report)
    with in_file(path):
        weight_map, total_size = _read_index(path)
    names = sorted(set(weight_map.values()))
    if (folder / SINGLE).exists() and SINGLE not in names:
        tell(FormatError(f"{SINGLE} lies beside it, which it does not name", todo="Remove one of them"))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        tell(_missing(missing, len(names)))
    shards: dict[str, Layout] = {}
    for name in names:
        if name not in missing:
            try:
                shards[name] = read_safetensors(folder / name, report=report)
            except FormatError as error:
                report(error)
    _require_places(weight_map, shards, tell)
    tensors = tuple(replace(tensor, file=n) for n, shard in enumerate(shards.values()) for tensor in shard.tensors)
    metadata: dict[str, Value] = {}
    for name, shard in shards.items():
        for key, value in shard.metadata.items():
            if metadata.setdefault(key, value) != value:
                metadata[f"{name}: {key}"] = value
    notes, nbytes = [], sum(tensor.nbytes for tensor in tensors)
    if len(shards) == len(names) and total_size not in (None, nbytes):  # some writers count bytes of another dtype
        notes.append(Note("total_size", str(nbytes), f"the tensors' bytes; the index says {total_size!r}"))
    files = (*(shard.files[0] for shard in shards.values()), _file(path))
    return _described(folder, Layout("safetensors", files, tensors, metadata), notes, report)


def _missing(names: list[str], count: int) -> FormatError:
    listed = ", ".join(names[:SHOWN_NAMES]) + (" and others" if len(names) > SHOWN_NAMES else "")
    return FormatError(
        f"{len(names)} of the {count} files that it names {'is' if len(names) == 1 else 'are'} missing: {listed}",
        todo="Download them into its folder",
        code="shard-missing",
    )


def _read_index(path: Path) -> tuple[dict[str, str], object]:
    """The file of each tensor, and the bytes that the index states for all of them."""
    index = strict_json.read_object(path, MAX_INDEX_NBYTES)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("no weight_map in it that gives each tensor's file", todo="It is no index of weights")
    for tensor, name in weight_map.items():
        if not (isinstance(name, str) and WEIGHTS_FILE.fullmatch(name)):
            raise FormatError(
                f"{name!r} is no plain name of a safetensors file",
                where=f"tensor {tensor!r}",
                todo="An index names files of its own folder",
            )
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _require_places(weight_map: dict[str, str], shards: dict[str, Layout], tell: Report) -> None:
    """Every tensor must be in exactly the file that the index names."""
    places = {(tensor, name) for tensor, name in weight_map.items() if name in shards}
    for name, shard in shards.items():
        for tensor in shard.tensors:
            if (tensor.name, name) in places:
                places.remove((tensor.name, name))
                continue
            other = weight_map.get(tensor.name)
            what = f"{name} holds it, but the index {f'puts it into {other}' if other else 'does not name it'}"
            tell(FormatError(what, where=f"tensor {tensor.name!r}", code="shard-alien"))
    for missing, name in sorted(places):
        what = f"the index puts it into {name}, which does not hold it"
        tell(FormatError(what, where=f"tensor {missing!r}", code="shard-alien"))


def _described(folder: Path, layout: Layout, notes: list[Note], report: Report) -> Layout:
    """The layout of the weights with what the folder's other files say."""
    others = [folder / name for name in (CONFIG, *TOKENIZERS, TOKENIZER_CONFIG)]
    files = (*layout.files, *(_file(path) for path in others if path.is_file()))
    metadata, hparams, tokenizer = dict(layout.metadata), None, None
    try:
        hparams, keys, more = _read_config(folder / CONFIG)
        metadata |= keys
        notes += more
    except FormatError as error:
        report(error)
    try:
        tokenizer, more = _tokenizer(folder, era="3.1" if hparams and hparams.rope_scaling else "3")
        notes += more
    except FormatError as error:
        report(error)
    return replace(
        layout,
        format="Hugging Face",
        files=files,
        metadata=metadata,
        hparams=hparams,
        tokenizer=tokenizer,
        notes=tuple(notes),
    )


def _read_config(path: Path) -> tuple[Hyperparameters | None, dict[str, Value], Sequence[Note]]:
    """Hyperparameters where config.json has a LLaMA's, all that it says, and notes."""
    if not path.is_file():
        return None, {}, [Note("hyperparameters", "none", f"there is no {path.name}")]
    with in_file(path):
        config = strict_json.read_object(path, hf_config.MAX_NBYTES)
        keys = {f"config.{key}": _value(value) for key, value in config.items() if value is not None}
        try:
            hparams, notes = hf_config.hyperparameters(config)
        except UnsupportedError as error:
            return None, keys, [Note("hyperparameters", "none", f"{path.name}: {error.where}: {error.what}")]
        return hparams, keys, notes


def _tokenizer(folder: Path, era: str) -> tuple[Tokenizer | None, Sequence[Note]]:
    """The vocabulary, from the first of the tokenizer files that is there; None and the reason where it is unread."""
    pieces, library = (folder / name for name in TOKENIZERS)
    if pieces.is_file():
        return read_tokenizer(pieces, era=era), ()
    if not library.is_file():
        return None, [Note("tokenizer", "none", f"there is no {' or '.join(TOKENIZERS)}")]
    config: dict[str, Any] = {}
    if (folder / TOKENIZER_CONFIG).is_file():
        with in_file(folder / TOKENIZER_CONFIG):
            config = strict_json.read_object(folder / TOKENIZER_CONFIG, MAX_TOKENIZER_NBYTES)
    with in_file(library):
        try:
            return hf_json.from_json(strict_json.read_object(library, MAX_TOKENIZER_NBYTES), config), ()
        except UnsupportedError as error:
            return None, [Note("tokenizer", "none", f"{library.name}: {error.what}")]


def _pickled(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if PICKLED.fullmatch(path.name))


def _file(path: Path) -> File:
    return File(path, path.stat().st_size)


def _value(value: Any) -> Value:
    """A value of JSON as metadata: itself where GGUF has its kind, its JSON text where not."""
    if isinstance(value, bool):
        return boolean(value)
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
        return Value(Kind.INT64, value)
    if isinstance(value, float):
        return Value(Kind.FLOAT64, value)
    return string(value if isinstance(value, str) else json.dumps(value))
