"""What running a model will take of memory, by its hyperparameters: what is shared, what is private, and why."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint import Hyperparameters
from ..errors import UnsupportedError, UsageError
from ..layout import Layout

BATCH = 512  # tokens of a prompt that `run` computes at once (runtime/llamatools_runtime/generation.py)
SCRATCH = 1 << 20  # bytes of rows that it decodes at once (weights.py)
WIDTH = 16  # heads in the cache are filled up to a multiple of this (cache.py)
CACHE_STEP = 256  # llama.cpp rounds the context of its cache up to a multiple (llama-context.cpp)


@dataclass(frozen=True)
class Need:
    """Memory for one purpose. is_shared: between all processes that use the file. meaning: a line for people."""

    name: str
    nbytes: int
    is_shared: bool
    meaning: str


def needs(layout: Layout, context: int | None = None) -> list[Need]:
    """What `llamatools run` takes at most, and what the same cache takes in llama.cpp.

    context: in tokens, the model's own by default. Python, numpy and the vocabulary come on top.
    Raises UnsupportedError for what is no GGUF file of a LLaMA, UsageError for more tokens than the model's context.
    """
    h = layout.hparams
    if not layout.format.startswith("GGUF") or h is None:
        raise UnsupportedError("what running takes is known for GGUF files of LLaMAs only", file=layout.files[0].path)
    n_tokens = h.max_seq_len if context is None else context
    if n_tokens > h.max_seq_len:
        raise UsageError(
            f"{n_tokens} tokens are more than the {h.max_seq_len} of the model's context", where="--context"
        )
    padded = -(-n_tokens // CACHE_STEP) * CACHE_STEP
    width = -(-h.head_dim // WIDTH) * WIDTH
    ours, theirs = cache_nbytes(h, n_tokens, width), cache_nbytes(h, padded, h.head_dim)
    working = working_nbytes(h, n_tokens)
    of_theirs = f"of {padded} tokens in float16, its default: private, taken at once"
    return [
        Need("weights", layout.size, True, "the mapped file: shared by all processes, dropped where memory is short"),
        Need("keys and values", ours, False, f"of {n_tokens} tokens in float16: private, grows with the text"),
        Need("working memory", working, False, "what a step computes with: private, freed when it is done"),
        Need("llama.cpp's keys and values", theirs, False, of_theirs),
    ]


def cache_nbytes(h: Hyperparameters, n_tokens: int, width: int) -> int:
    """Bytes of a key and a value per token, layer and head of them, as float16. width: numbers of a head."""
    return 2 * h.n_layers * h.n_kv_heads * n_tokens * width * 2


def working_nbytes(h: Hyperparameters, n_tokens: int) -> int:
    """Bytes of float32 that `run` has at the worst moment of reading a prompt of n_tokens.

    That is in attention for a long text, in the feed-forward part or in the logits for a short one.
    """
    n_new = min(BATCH, n_tokens)
    residual = 3 * n_new * h.dim  # x, x normed, what is added to x
    heads = n_new * (3 * h.n_heads + 3 * h.n_kv_heads) * h.head_dim  # queries, keys, values; turned; what is found
    scores = h.n_heads * n_tokens  # of one token
    feed_forward = 3 * n_new * h.hidden_dim  # gate, up and their product
    return 4 * (residual + max(heads, scores, feed_forward, h.vocab_size)) + SCRATCH
