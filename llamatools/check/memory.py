"""What running a model will take of memory, by its hyperparameters: what is shared, what is private, and why."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint import Hyperparameters
from ..errors import UnsupportedError, UsageError
from ..layout import Layout

BATCH = 256  # tokens of a prompt that `run` computes at once (runtime/llamatools_runtime/generation.py)
SCRATCH = 1 << 20  # bytes of rows that it decodes at once (weights.py)
SCORES = 4  # arrays of the size of the attention scores that are alive at once, at the worst moment (model.py, softmax)
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
    ours, theirs = cache_nbytes(h, n_tokens, 4), cache_nbytes(h, padded, 2)
    working = working_nbytes(h, n_tokens)
    of_theirs = f"of {padded} tokens in float16, its default: private, taken at once"
    return [
        Need("weights", layout.size, True, "the mapped file: shared by all processes, dropped where memory is short"),
        Need("keys and values", ours, False, f"of {n_tokens} tokens in float32: private, grows with the text"),
        Need("working memory", working, False, "what a step computes with: private, freed when it is done"),
        Need("llama.cpp's keys and values", theirs, False, of_theirs),
    ]


def cache_nbytes(h: Hyperparameters, n_tokens: int, number: int) -> int:
    """Bytes of a key and a value per token, layer and head of them. number: bytes of one number."""
    return 2 * h.n_layers * h.n_kv_heads * h.head_dim * n_tokens * number


def working_nbytes(h: Hyperparameters, n_tokens: int) -> int:
    """Bytes of float32 that `run` has at the worst moment of reading a prompt of n_tokens.

    That is in attention for a long text, in the feed-forward part or in the logits for a short one.
    """
    n_new = min(BATCH, n_tokens)
    residual = 2 * n_new * h.dim  # x, and x normed
    mask = 2 * n_new * n_tokens
    heads = (2 * h.n_heads + 2 * h.n_kv_heads) * h.head_dim * n_new  # queries before and after turning, keys, values
    attention = SCORES * h.n_heads * n_new * n_tokens + mask + heads
    feed_forward = 3 * n_new * h.hidden_dim  # gate, up, and a part of silu
    return 4 * (residual + max(attention, feed_forward, h.vocab_size)) + SCRATCH
