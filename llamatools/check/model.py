"""Whether tensors, hyperparameters and vocabulary of a model belong together.

What a LLaMA needs, and which further tensors llama.cpp knows, stands in its src/models/llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np

from ..checkpoint import BYTE, Hyperparameters, Tokenizer
from ..layout import Layout, PlacedTensor
from ..metadata import Strings
from ..names import EMBEDDING, OUTPUT, ROPE_FACTORS, hf_to_gguf, meta_to_gguf, shapes
from .finding import Finding

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
BY_TOKEN = {meta_to_gguf(EMBEDDING), meta_to_gguf(OUTPUT)}  # a row for each token
OPTIONAL = re.compile(
    r"rope_(freqs|factors_(long|short))\.weight|"
    r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.(weight|bias|scale|input_scale)|"
    r"blk\.\d+\.ffn_(gate_inp|(gate|up|down)_(exps|shexp)|(gate|up|down)\.\d+)\.\w+"
)

BYTE_TEXT = re.compile("<0x[0-9A-Fa-f]{2}>")

PARTIAL = {"shard-missing", "shard-name"}  # problems that keep tensors from being listed


def check(layout: Layout) -> Iterator[Finding]:
    """Of a GGUF: vocabulary and embedding of any architecture, and the tensors of a LLaMA."""
    file = str(layout.files[0].path)
    yield from _vocabulary(layout, file)
    if layout.hparams and layout.tensors:
        hparams = layout.hparams
        faults = list(_hparams(hparams, file))
        yield from faults
        if not faults:
            yield from _tensors(layout, hparams, file)


def check_hugging_face(layout: Layout) -> Iterator[Finding]:
    """The tensors of a LLaMA in Hugging Face's folder, held against its config.json."""
    if layout.hparams is None or layout.problems:
        return
    wanted = {meta_to_gguf(name): shape for name, shape in shapes(layout.hparams).items()}
    present = {hf_to_gguf(tensor.name) or tensor.name: tensor for tensor in layout.tensors}
    for name, tensor in present.items():
        if name in wanted and tensor.shape != wanted[name]:
            yield _unlike(tensor, wanted[name], str(layout.files[tensor.file].path), "config.json asks")
    for finding in _missing(wanted, present, layout.hparams.n_layers, str(layout.files[0].path)):
        yield replace(finding, what=f"{finding.what} in GGUF's names")


def _unlike(tensor: PlacedTensor, wanted: tuple[int, ...], file: str, who_asks: str) -> Finding:
    what = f"{list(tensor.shape)}, where {who_asks} for {list(wanted)}"
    return Finding("shape-mismatch", what, file, f"tensor {tensor.name!r}", (tensor.offset, tensor.end))


def _missing(wanted: Collection[str], present: Collection[str], n_layers: int, file: str) -> Iterator[Finding]:
    missing = [name for name in wanted if name not in present and not _may_miss(name, present)]
    if missing:
        what = f"{len(missing)} of the {len(wanted)} tensors of a LLaMA of {n_layers} layers are missing, the first is "
        yield Finding("tensor-missing", f"{what}{missing[0]!r}", file)


def _vocabulary(layout: Layout, file: str) -> Iterator[Finding]:
    if layout.tokenizer is None:
        return
    tokens = layout.tokenizer.tokens
    n_tokens = len(tokens)
    n_texts = tokens.n_distinct() if isinstance(tokens, Strings) else len(set(tokens))
    if n_texts < n_tokens:
        what = f"{n_tokens} tokens have {n_texts} texts, where each must have its own: llama.cpp ends the process"
        yield Finding("vocabulary", what, file, "key 'tokenizer.ggml.tokens'")
    yield from _byte_tokens(layout.tokenizer, file)
    if layout.hparams and layout.hparams.vocab_size != n_tokens:
        what = f"{layout.hparams.vocab_size} where the vocabulary has {n_tokens} tokens"
        yield Finding("vocabulary", what, file, "key 'llama.vocab_size'")
    for tensor in layout.tensors:
        if tensor.name in BY_TOKEN and len(tensor.shape) == 2 and tensor.shape[0] != n_tokens:
            yield Finding(
                "vocabulary",
                f"{tensor.shape[0]} rows for a vocabulary of {n_tokens} tokens",
                file,
                f"tensor {tensor.name!r}",
                remedy="The vocabulary is of another model",
            )


def _byte_tokens(tokenizer: Tokenizer, file: str) -> Iterator[Finding]:
    """The tokens of a SentencePiece vocabulary that stand for bytes, whose number llama.cpp takes from their text."""
    if tokenizer.model != "llama":
        return
    for id_ in np.flatnonzero(np.asarray(tokenizer.types) == BYTE).tolist():
        text = tokenizer.tokens[id_]
        if not BYTE_TEXT.fullmatch(text):
            what = f"token {id_} stands for a byte, but its text {text!r} names none as <0x00> to <0xFF> do"
            yield Finding("vocabulary", what, file, "key 'tokenizer.ggml.tokens'")
            return


def _hparams(h: Hyperparameters, file: str) -> Iterator[Finding]:
    if h.n_layers > MAX_LAYERS:
        what = f"{h.n_layers} layers, where llama.cpp takes {MAX_LAYERS} at most"
        yield Finding("hparams", what, file, "key 'llama.block_count'")
    if h.n_heads % h.n_kv_heads:
        what = f"{h.n_heads} heads cannot share {h.n_kv_heads} heads of keys and values equally"
        yield Finding("hparams", what, file, "key 'llama.attention.head_count_kv'")


def _tensors(layout: Layout, h: Hyperparameters, file: str) -> Iterator[Finding]:
    if layout.tokenizer:
        h = replace(h, vocab_size=len(layout.tokenizer.tokens))
    wanted = {meta_to_gguf(name): shape for name, shape in shapes(h).items()}
    present = {tensor.name: tensor for tensor in layout.tensors}
    for name, tensor in present.items():
        shape = (h.head_dim // 2,) if name == ROPE_FACTORS else wanted.get(name)
        is_vocabulary = name in BY_TOKEN and layout.tokenizer and tensor.shape[1:] == (h.dim,)
        if shape and tensor.shape != shape and not is_vocabulary:
            unlike = _unlike(tensor, shape, file, "the hyperparameters ask")
            yield unlike if layout.stopped_at is None else replace(unlike, span=None)
    if layout.stopped_at is not None or any(problem.code in PARTIAL for problem in layout.problems):
        return  # there are more tensors than could be listed
    yield from _missing(wanted, present, h.n_layers, file)
    unknown = [name for name in present if name not in wanted and not _is_optional(name, h.n_layers)]
    if unknown:
        yield Finding(
            "tensor-unknown",
            f"{len(unknown)} {'tensors are' if len(unknown) > 1 else 'tensor is'} none of a LLaMA of {h.n_layers} "
            f"layers, the first is {unknown[0]!r}; llama.cpp refuses such files",
            file,
        )


def _may_miss(name: str, present: Collection[str]) -> bool:
    """The output, which then is the embedding; matrices that a fused one or experts stand for."""
    if name == meta_to_gguf(OUTPUT):
        return True
    layer, _, matrix = name.rpartition("ffn_" if "ffn_" in name else "attn_")
    if matrix in ("q.weight", "k.weight", "v.weight"):
        return f"{layer}attn_qkv.weight" in present
    return matrix in ("gate.weight", "up.weight", "down.weight") and f"{layer}ffn_gate_inp.weight" in present


def _is_optional(name: str, n_layers: int) -> bool:
    if not OPTIONAL.fullmatch(name):
        return False
    return not name.startswith("blk.") or int(name.split(".")[1]) < n_layers
