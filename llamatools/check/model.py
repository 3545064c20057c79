"""Whether tensors, hyperparameters and vocabulary of a GGUF file belong together.

What a LLaMA needs, and which further tensors llama.cpp knows, stands in its src/models/llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace

from ..checkpoint import Hyperparameters
from ..layout import Layout
from ..names import EMBEDDING, OUTPUT, ROPE_FACTORS, meta_to_gguf, shapes
from .finding import Finding

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
BY_TOKEN = {meta_to_gguf(EMBEDDING), meta_to_gguf(OUTPUT)}  # a row for each token
OPTIONAL = re.compile(
    r"rope_(freqs|factors_(long|short))\.weight|"
    r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.(weight|bias|scale|input_scale)|"
    r"blk\.\d+\.ffn_(gate_inp|(gate|up|down)_(exps|shexp)|(gate|up|down)\.\d+)\.\w+"
)

PARTIAL = {"shard-missing", "shard-name"}  # problems that keep tensors from being listed


def check(layout: Layout) -> Iterator[Finding]:
    """Vocabulary and embedding of any architecture, and the tensors of a LLaMA."""
    file = str(layout.files[0].path)
    yield from _vocabulary(layout, file)
    if layout.hparams and layout.tensors:
        hparams = layout.hparams
        faults = list(_hparams(hparams, file))
        yield from faults
        if not faults:
            yield from _tensors(layout, hparams, file)


def _vocabulary(layout: Layout, file: str) -> Iterator[Finding]:
    if layout.tokenizer is None:
        return
    n_tokens = len(layout.tokenizer.tokens)
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
            yield Finding(
                "shape-mismatch",
                f"{list(tensor.shape)}, where the hyperparameters ask for {list(shape)}",
                file,
                f"tensor {name!r}",
                (tensor.offset, tensor.end) if layout.stopped_at is None else None,
            )
    if layout.stopped_at is not None or any(problem.code in PARTIAL for problem in layout.problems):
        return  # there are more tensors than could be listed
    missing = [name for name in wanted if name not in present and not _may_miss(name, present)]
    if missing:
        yield Finding(
            "tensor-missing",
            f"{len(missing)} of the {len(wanted)} tensors of a LLaMA of {h.n_layers} layers are missing, "
            f"the first is {missing[0]!r}",
            file,
        )
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
