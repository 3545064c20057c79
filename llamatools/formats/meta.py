"""A Meta checkpoint: a folder with params.json, consolidated.NN.pth (one shard or many) and tokenizer.model.

Each shard is one model-parallel rank's part. How a tensor was cut is read from the shapes: joined along rows (wq, wk,
wv, w1, w3, output, and tok_embeddings in Llama 3), along columns (wo, w2, and tok_embeddings before Llama 3), or not at
all (norms, of which every shard has a copy). Merging is lazy: rows of the whole are rows of the parts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import names
from ..checkpoint import Checkpoint, Hyperparameters, Tokenizer
from ..errors import FormatError, in_file
from ..tensors import Concat, LazyTensor, Replicated, SourceFile
from ..tokenizers import pad_vocab, read_tokenizer, with_instruct
from . import torch_zip
from .meta_params import Overrides, derive, read_params
from .pth import PthFile, read_pth

SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
FIRST_GATE = "layers.0.feed_forward.w1.weight"
BUFFER = "a buffer that follows from rope_theta; every runtime computes it"


@dataclass(frozen=True)
class MetaOptions:
    """What the user states about a Meta checkpoint beyond its files.

    tokenizer: where tokenizer.model is, if not in the folder or the one above. overrides: hyperparameters.
    instruct: the model was tuned to take turns, so the id that ends a turn ends the text.
    pad_vocab: fill the vocabulary up to the embedding's rows. chat_template: stored, never executed.
    """

    tokenizer: Path | None = None
    overrides: Overrides = field(default_factory=Overrides)
    instruct: bool = False
    pad_vocab: bool = False
    chat_template: str | None = None


DEFAULTS = MetaOptions()


def is_meta_folder(path: Path) -> bool:
    """Whether a folder holds params.json or a consolidated.NN.pth."""
    return path.is_dir() and ((path / "params.json").exists() or has_shards(path))


def has_shards(folder: Path) -> bool:
    """Whether a folder holds a consolidated.NN.pth."""
    return any(SHARD.fullmatch(path.name) for path in folder.iterdir())


def open_meta(folder: Path, options: MetaOptions = DEFAULTS) -> Checkpoint:
    """The checkpoint in `folder`, merged, named and checked; nothing but headers is read.

    Raises FormatError for missing or contradicting files, UnsupportedError for models other than LLaMA text models.
    """
    params_path = folder / "params.json"
    params = read_params(params_path)
    shards = [read_pth(path) for path in shard_paths(folder)]
    tokenizer_path = options.tokenizer or find_tokenizer(folder)
    tokenizer = None
    if tokenizer_path:
        tokenizer = read_tokenizer(tokenizer_path, era="3.1" if params.get("use_scaled_rope") else "3")
    with in_file(folder):
        _check_names(shards, int(params["n_layers"]))
        vocab_size = _vocab_size(shards, int(params["dim"]))
        hidden_dim = shards[0].tensors[FIRST_GATE].shape[0] * len(shards)
    byte_level = None if tokenizer is None else tokenizer.model == "gpt2"
    with in_file(params_path):
        hparams, notes = derive(
            params, hidden_dim=hidden_dim, vocab_size=vocab_size, byte_level=byte_level, overrides=options.overrides
        )
    with in_file(folder):
        tensors = _merge(shards, hparams)
    if tokenizer is not None and tokenizer_path is not None:
        with in_file(tokenizer_path):
            tokenizer = _finish_tokenizer(tokenizer, vocab_size, options)
    others = [path for path in (params_path, tokenizer_path) if path]
    return Checkpoint(
        path=folder,
        scheme="meta",
        tensors=tensors,
        files=tuple(shard.file for shard in shards) + tuple(SourceFile(p, p.stat().st_size) for p in others),
        hparams=hparams,
        tokenizer=tokenizer,
        notes=notes,
        dropped={name: BUFFER for shard in shards for name in shard.tensors if names.DROPPED.fullmatch(name)},
    )


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a checkpoint in order. Raises FormatError when there is none or one in between is missing."""
    found = sorted(path for path in folder.iterdir() if SHARD.fullmatch(path.name))
    if not found:
        raise FormatError(
            "no consolidated.00.pth here", file=folder, todo="Name the folder that holds a Meta checkpoint"
        )
    for n, path in enumerate(found):
        if path.name != f"consolidated.{n:02}.pth":
            raise FormatError(
                f"consolidated.{n:02}.pth is missing, though {found[-1].name} is there",
                file=folder,
                todo="Download the checkpoint again",
            )
    return found


def find_tokenizer(folder: Path) -> Path | None:
    """tokenizer.model in the folder or, as LLaMA 1 and 2 were published, in the one above."""
    for place in (folder, folder.absolute().parent):
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    return None


def verify_source(folder: Path, progress: Callable[[int], object] = lambda n: None) -> list[str]:
    """Reads the checkpoint's files whole and checks them: checklist.chk (MD5, where present), CRC-32 of every record.

    Returns what was verified, a line each. progress is told of bytes read.
    Raises FormatError naming the first file that differs.
    """
    verified = []
    checklist = folder / "checklist.chk"
    if checklist.is_file():
        with in_file(checklist):
            for n, line in enumerate(checklist.read_text("utf-8", "surrogateescape").splitlines(), 1):
                match = re.fullmatch(r"([0-9a-f]{32})[ *]+([^/\\\0]+)", line.strip())
                if not match:
                    raise FormatError("not an MD5 sum and a file name", where=f"line {n}")
                expected, name = match.groups()
                with in_file(folder / name):
                    actual = _md5(folder / name, progress)
                    if actual != expected:
                        raise FormatError(
                            f"its MD5 sum is {actual}, but checklist.chk says {expected}", todo="Download it again"
                        )
                verified.append(f"{name}: MD5 sum as in checklist.chk")
    for path in shard_paths(folder):
        torch_zip.verify_crc(path, progress)
        verified.append(f"{path.name}: CRC-32 of every record")
    return verified


def _md5(path: Path, progress: Callable[[int], object]) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def _check_names(shards: Sequence[PthFile], n_layers: int) -> None:
    """Every shard must hold the same tensors: those of a LLaMA of n_layers, and perhaps buffers."""
    wanted = dict.fromkeys(names.meta_names(n_layers))
    for shard in shards:
        file = shard.file.path.name
        for name in shard.tensors:
            if name not in wanted and not names.DROPPED.fullmatch(name):
                raise FormatError(
                    f"unknown tensor {name!r}", where=file, todo=f"A LLaMA of {n_layers} layers has no such tensor"
                )
        for name in wanted:
            if name not in shard.tensors and (name != names.OUTPUT or names.OUTPUT in shards[0].tensors):
                raise FormatError(f"tensor {name!r} is missing", where=file)


def _vocab_size(shards: Sequence[PthFile], dim: int) -> int:
    """Rows of the whole embedding: its shards are cut along rows in Llama 3 and along columns before."""
    shape = shards[0].tensors[names.EMBEDDING].shape
    if len(shape) == 2 and shape[1] == dim:
        return shape[0] * len(shards)
    if len(shape) == 2 and shape[1] * len(shards) == dim:
        return shape[0]
    raise FormatError(
        f"{list(shape)} in each of {len(shards)} shards does not make rows of dim {dim}",
        where=f"tensor {names.EMBEDDING!r}",
        todo="Shards are missing, or params.json is of another model",
    )


def _merge(shards: Sequence[PthFile], hparams: Hyperparameters) -> dict[str, LazyTensor]:
    """The whole tensors, in the order of execution. Raises FormatError where shards do not make the wanted shape."""
    whole: dict[str, LazyTensor] = {}
    for name, wanted in names.shapes(hparams).items():
        parts = [shard.tensors[name] for shard in shards if name in shard.tensors]
        if parts:
            whole[name] = _join(name, parts, wanted)
    return whole


def _join(name: str, parts: Sequence[LazyTensor], wanted: tuple[int, ...]) -> LazyTensor:
    shape, n = parts[0].shape, len(parts)
    if shape == wanted:
        return parts[0] if n == 1 else Replicated(name, parts)
    if len(shape) == len(wanted) == 2:
        if (shape[0] * n, shape[1]) == wanted:
            return Concat(name, parts, axis=0)
        if (shape[0], shape[1] * n) == wanted:
            return Concat(name, parts, axis=-1)
    each = f" in each of {n} shards" if n > 1 else ""
    raise FormatError(
        f"shape {list(shape)}{each}, where params.json asks for {list(wanted)}",
        where=f"tensor {name!r}",
        todo="Shards are missing, or params.json is of another model",
    )


def _finish_tokenizer(tokenizer: Tokenizer, n_rows: int, options: MetaOptions) -> Tokenizer:
    n_tokens = len(tokenizer.tokens)
    if n_tokens < n_rows and options.pad_vocab:
        tokenizer = pad_vocab(tokenizer, n_rows)
    elif n_tokens != n_rows:
        raise FormatError(
            f"{n_tokens} tokens, but the embedding has {n_rows} rows",
            todo="Add --pad-vocab to fill up with unused tokens" if n_tokens < n_rows else "It is of another model",
        )
    if options.instruct:
        tokenizer = with_instruct(tokenizer)
    return replace(tokenizer, chat_template=options.chat_template) if options.chat_template else tokenizer
