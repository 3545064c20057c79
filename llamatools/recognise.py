"""What a path holds, recognised by content and not by name, and read accordingly.

A format's module is imported when it is asked, so that a GGUF file, the commonest, is looked at without any other.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from . import names
from .checkpoint import Checkpoint, Scheme
from .errors import FormatError, LlamatoolsError, Report, UnsupportedError, in_file, naming, refuse
from .formats import gguf_split
from .formats.impostors import IMPOSTORS, refuse_impostor
from .layout import File, Layout, PlacedTensor
from .tensors import FileTensor, LazyTensor, SourceFile
from .tokenizers import gguf_keys

if TYPE_CHECKING:
    from .formats.meta import MetaOptions


def open(path: str | os.PathLike[str], options: MetaOptions | None = None) -> Checkpoint:
    """Opens the model at `path`, whatever `inspect` recognises.

    Only headers are read; tensors stay lazy. options: what the user states about a Meta folder.
    Raises FormatError for a file that is damaged, hostile or no model, UnsupportedError for other kinds of models.
    """
    path = Path(path)
    format = _format(path, options)
    if format.name == META:
        from .formats.meta import DEFAULTS, open_meta

        return open_meta(path, options or DEFAULTS)
    layout = format.read(path, report=refuse)
    tensors: dict[str, LazyTensor] = {tensor.name: tensor.source for tensor in layout.tensors if tensor.source}
    if len(tensors) < len(layout.tensors):
        raise UnsupportedError("a model in parts of before ggjt can be looked at only", file=path)
    sources = {t.file.path: t.file for t in tensors.values() if isinstance(t, FileTensor)}
    return Checkpoint(
        path=path,
        scheme=format.scheme,
        tensors=tensors,
        files=tuple(sources.get(file.path) or SourceFile(file.path, file.size) for file in layout.files),
        hparams=layout.hparams,
        tokenizer=layout.tokenizer,
        metadata=layout.metadata,
        notes=layout.notes,
    )


def inspect(path: str | os.PathLike[str], options: MetaOptions | None = None) -> Layout:
    """What the model at `path` looks like: hyperparameters, tokenizer, and where every tensor lies.

    path: a GGUF file or any shard of a set, a safetensors file or the index of several, a .pth, a ggml, ggmf or ggjt
    file, or a folder as Meta or Hugging Face publish them; told apart by content. A damaged file is shown as far as it
    makes sense: what is wrong with it stands in the layout's `problems`, as in `check`'s findings. A model of another
    architecture has no hyperparameters here.
    Raises FormatError where there is no model at all, UnsupportedError for files that are none of llamatools' business.
    """
    path = Path(path)
    problems: list[LlamatoolsError] = []
    layout = _read(path, options, problems.append)
    return replace(layout, problems=tuple(problems))


def format_of(path: str | os.PathLike[str]) -> str:
    """The name of the format at `path`, such as "GGUF" or META. Raises FormatError for what is no model."""
    return _format(Path(path), None).name


class Reader(Protocol):
    """What every format's module has."""

    def __call__(self, path: Path, *, report: Report) -> Layout: ...


@dataclass(frozen=True)
class Format:
    """A kind of model: its name, how it is read, and whose names its tensors have."""

    name: str
    read: Reader
    scheme: Scheme


def _read_pth(path: Path, *, report: Report) -> Layout:
    from .formats.pth import read_pth

    file = read_pth(path)
    return Layout("torch zip", (File(path, file.file.size),), tuple(_placed(t, 0) for t in file.tensors.values()))


def _read_gguf(path: Path, *, report: Report) -> Layout:
    layout = gguf_split.read_gguf_set(path, report=report)
    if layout.stopped_at is not None:  # what is missing may just not have been reached
        report = list[LlamatoolsError]().append
    return _understood(layout, naming(path, report))


def _file_formats() -> Iterator[tuple[Callable[[bytes], bool], Format]]:
    """What a file's first 512 bytes must be like -> its format.

    The first that knows the file reads it, or names what is wrong with it.
    """
    yield lambda head: head[:4] in (b"GGUF", b"FUGG"), Format("GGUF", _read_gguf, "gguf")
    from .formats import ggml, hf, pth, safetensors

    yield safetensors.is_safetensors, Format("safetensors", safetensors.read_safetensors, "hf")
    yield ggml.is_ggml, Format("ggml", ggml.read_ggml, "meta")
    yield pth.is_pth, Format("torch zip", _read_pth, "meta")
    yield hf.is_index, Format("Hugging Face", hf.read_sharded, "hf")


META = "Meta checkpoint"
KNOWN = "GGUF, safetensors, .pth, ggml, ggmf and ggjt files are read, and folders as Meta and Hugging Face publish them"


def _read(path: Path, options: MetaOptions | None, report: Report) -> Layout:
    """The layout of what is at `path`. report: is told what is wrong with it; if it does not raise, reading goes on."""
    report = naming(path, report)
    try:
        format = _format(path, options)
    except FormatError as error:
        if error.code not in IMPOSTORS:
            raise
        report(error)
        return _unread(path, "no model")
    try:
        with in_file(path):
            return format.read(path, report=report)
    except FormatError as error:
        report(error)
        return _unread(path, format.name)


def _unread(path: Path, kind: str) -> Layout:
    """The layout of a file, or of a folder with files, of which nothing more is known."""
    paths = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return Layout(kind, tuple(File(file, file.stat().st_size) for file in paths), ())


def _format(path: Path, options: MetaOptions | None) -> Format:
    """How to read the path. Raises FormatError for what is no model."""
    with in_file(path):
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return _folder_format(path, options)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("neither a file nor a folder")
        with path.open("rb") as file:
            head = file.read(512)
        for begins, format in _file_formats():
            if begins(head):
                return format
        refuse_impostor(head, status.st_size)
        raise FormatError(f"no model file: it begins with {head[:8]!r}", todo=KNOWN)


def _folder_format(path: Path, options: MetaOptions | None) -> Format:
    """A params.json alone may lie beside Hugging Face's files, as Mistral's does; Meta's weights may not."""
    from .formats.hf import is_hf_folder, read_hf
    from .formats.meta import DEFAULTS, has_shards, is_meta_folder, open_meta

    if not is_hf_folder(path):
        if is_meta_folder(path):
            return Format(META, lambda path, *, report: _meta_layout(open_meta(path, options or DEFAULTS)), "meta")
        raise FormatError(
            "not a model's folder: none of params.json, consolidated.00.pth, config.json, model.safetensors and its "
            "index is in it"
        )
    if has_shards(path):
        raise FormatError(
            "both a Meta checkpoint and Hugging Face's files are in it",
            todo="Move one of them into a folder of its own",
        )
    return Format("Hugging Face", read_hf, "hf")


def _understood(layout: Layout, report: Report) -> Layout:
    """A GGUF's layout with hyperparameters and tokenizer read from its keys."""
    architecture = layout.metadata.get("general.architecture")
    is_llama = architecture is not None and architecture.data == "llama"
    hparams, tokenizer = None, None
    try:
        hparams = names.hparams_from_gguf(layout.metadata) if is_llama else None
    except FormatError as error:
        report(error)
    try:
        tokenizer = gguf_keys.from_metadata(layout.metadata, report)
    except FormatError as error:
        report(error)
    return replace(layout, hparams=hparams, tokenizer=tokenizer)


def _meta_layout(checkpoint: Checkpoint) -> Layout:
    """The shards' own tensors, in the order of execution; each in the file where it lies."""
    files = {file: n for n, file in enumerate(checkpoint.files)}
    parts = [leaf for tensor in checkpoint.tensors.values() for leaf in tensor.leaves() if isinstance(leaf, FileTensor)]
    return Layout(
        format=META,
        files=tuple(File(file.path, file.size) for file in checkpoint.files),
        tensors=tuple(_placed(part, files[part.file]) for part in parts),
        hparams=checkpoint.hparams,
        tokenizer=checkpoint.tokenizer,
        notes=checkpoint.notes,
        dropped=checkpoint.dropped,
    )


def _placed(tensor: FileTensor, file: int) -> PlacedTensor:
    return PlacedTensor(
        tensor.name, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes, file, tensor.strides, tensor
    )
