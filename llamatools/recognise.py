"""What a path holds, recognised by content and not by name, and read accordingly."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

from . import names
from .checkpoint import Checkpoint, Scheme
from .errors import FormatError, LlamatoolsError, Report, in_file, naming, refuse
from .formats import gguf, safetensors
from .formats.impostors import IMPOSTORS, refuse_impostor
from .formats.meta import DEFAULTS, MetaOptions, is_meta_folder, open_meta
from .formats.pth import read_pth
from .layout import File, Layout, PlacedTensor
from .tensors import FileTensor, LazyTensor
from .tokenizers import gguf_keys

# Whose names a single file's tensors have; a folder of Meta's is opened by its own reader.
SCHEMES: dict[str, Scheme] = {"GGUF": "gguf", "torch zip": "meta", "safetensors": "hf"}


def open(path: str | os.PathLike[str], options: MetaOptions = DEFAULTS) -> Checkpoint:
    """Opens the model at `path`: a Meta folder, a GGUF, a single .pth or a safetensors file, told apart by content.

    Only headers are read; tensors stay lazy. options: what the user states about a Meta folder.
    Raises FormatError for a file that is damaged, hostile or no model, UnsupportedError for other kinds of models.
    """
    path = Path(path)
    if _kind(path) == "Meta checkpoint":
        return open_meta(path, options)
    layout = _read(path, options, refuse)
    tensors: dict[str, LazyTensor] = {tensor.name: tensor.source for tensor in layout.tensors if tensor.source}
    sources = dict.fromkeys(tensor.file for tensor in tensors.values() if isinstance(tensor, FileTensor))
    return Checkpoint(
        path=path,
        scheme=SCHEMES[layout.format.partition(" v")[0]],
        tensors=tensors,
        files=tuple(sources),
        hparams=layout.hparams,
        tokenizer=layout.tokenizer,
        metadata=layout.metadata,
    )


def inspect(path: str | os.PathLike[str], options: MetaOptions = DEFAULTS) -> Layout:
    """What the model at `path` looks like: hyperparameters, tokenizer, and where every tensor lies.

    Recognises what `open` does. A damaged file is shown as far as it makes sense: what is wrong with it stands in the
    layout's `problems`, as in `check`'s findings. A GGUF of another architecture has no hyperparameters here.
    Raises FormatError where there is no model at all, UnsupportedError for files that are none of llamatools' business.
    """
    path = Path(path)
    problems: list[LlamatoolsError] = []
    layout = _read(path, options, problems.append)
    return replace(layout, problems=tuple(problems))


def _read(path: Path, options: MetaOptions, report: Report) -> Layout:
    """The layout of what is at `path`. report: is told what is wrong with it; if it does not raise, reading goes on."""
    report = naming(path, report)
    try:
        kind = _kind(path)
    except FormatError as error:
        if error.code not in IMPOSTORS:
            raise
        report(error)
        return _unread(path, "no model")
    try:
        with in_file(path):
            if kind == "Meta checkpoint":
                return _meta_layout(open_meta(path, options))
            if kind == "GGUF":
                return _understood(gguf.read_gguf(path, report=report), report)
            if kind == "safetensors":
                return safetensors.read_safetensors(path, report=report)
            pth = read_pth(path)
            return Layout("torch zip", (File(path, pth.file.size),), tuple(_placed(t, 0) for t in pth.tensors.values()))
    except FormatError as error:
        report(error)
        return _unread(path, kind)


def _unread(path: Path, kind: str) -> Layout:
    """The layout of a file, or of a folder with files, of which nothing more is known."""
    paths = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return Layout(kind, tuple(File(file, file.stat().st_size) for file in paths), ())


def _kind(path: Path) -> str:
    """The format's name. Raises FormatError for what is no model."""
    with in_file(path):
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            if is_meta_folder(path):
                return "Meta checkpoint"
            raise FormatError("not a checkpoint's folder: neither params.json nor consolidated.00.pth is in it")
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("neither a file nor a folder")
        with path.open("rb") as file:
            head = file.read(512)
        if head[:4] in (b"GGUF", b"FUGG"):
            return "GGUF"
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= status.st_size:
            return "safetensors"
        if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80" or path.suffix in (".pth", ".pt", ".ckpt"):
            return "torch zip"  # or torch's older formats, which its reader refuses by name
        refuse_impostor(head, status.st_size)
        raise FormatError(
            f"no model file: it begins with {head[:8]!r}", todo="GGUF, safetensors, .pth and Meta folders are read"
        )


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
        format="Meta checkpoint",
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
