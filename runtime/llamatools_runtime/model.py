"""LLaMA on one page: from token ids to logits, the scores of every token that could come next.

Read `forward` at the end first; what it calls stands above it. A token is a vector of `dim` numbers, the residual
stream `x`. Every layer adds two things to it: what the token gathers from earlier tokens (`attention`), and what it
makes of that by itself (`feed_forward`). After the last layer the vector is compared with every token's own (`output`).

The comment on a line is the shape of what it assigns:
    n_tokens    tokens computed at once: a prompt's, or one
    n_past      tokens whose keys and values the cache held before
    n_ctx       n_past + n_tokens
    group       n_heads / n_kv_heads: the query heads that share one head of keys and values
Names are Meta's (llama-models, models/llama3/model.py). All arithmetic is float32, whatever the file stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llamatools.checkpoint import Hyperparameters
from llamatools.dtypes import Floats
from llamatools.errors import FormatError, SpaceError, UsageError

from .weights import Ids, Matrix, matmul

OnLayer = Callable[[int, Floats], None]


@dataclass(frozen=True)
class Layer:
    """The weights of a layer. Matrices are (out, in)."""

    attention_norm: Floats  # (dim,)
    wq: Matrix  # (n_heads * head_dim, dim)
    wk: Matrix  # (n_kv_heads * head_dim, dim)
    wv: Matrix  # (n_kv_heads * head_dim, dim)
    wo: Matrix  # (dim, n_heads * head_dim)
    ffn_norm: Floats  # (dim,)
    w1: Matrix  # (hidden_dim, dim)
    w3: Matrix  # (hidden_dim, dim)
    w2: Matrix  # (dim, hidden_dim)


@dataclass(frozen=True)
class Model:
    """A LLaMA. `output` is `tok_embeddings` itself where the two are tied."""

    hparams: Hyperparameters
    tok_embeddings: Matrix  # (vocab_size, dim)
    layers: Sequence[Layer]
    norm: Floats  # (dim,)
    output: Matrix  # (vocab_size, dim)
    rope_divisors: Floats  # (head_dim / 2,), ones where rotary embedding is not scaled


@dataclass
class Cache:
    """The keys and values of the tokens so far, so that each is computed once."""

    keys: Floats  # (n_layers, n_kv_heads, capacity, head_dim)
    values: Floats  # (n_layers, n_kv_heads, capacity, head_dim)
    n_past: int = 0

    @classmethod
    def of(cls, hparams: Hyperparameters, n_tokens: int | None = None) -> Cache:
        """A cache for n_tokens, at most and by default the model's whole context. Raises SpaceError."""
        h = hparams
        capacity = h.max_seq_len if n_tokens is None else min(n_tokens, h.max_seq_len)
        shape = (h.n_layers, h.n_kv_heads, capacity, h.head_dim)
        try:
            return cls(np.empty(shape, np.float32), np.empty(shape, np.float32))
        except (MemoryError, ValueError) as error:  # ValueError: more bytes than there are addresses
            raise SpaceError(
                f"the keys and values of {capacity} tokens take {2 * 4 * math.prod(shape)} bytes of memory, "
                "more than there is",
                todo="Ask for fewer tokens",
            ) from error

    @property
    def capacity(self) -> int:
        return int(self.keys.shape[2])


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Scales each token to a root mean square of one, then each of its numbers by a learned weight."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)  # (n_tokens, 1)
    normed: Floats = x / np.sqrt(mean_square + np.float32(eps))  # (n_tokens, dim)
    return normed * weight  # (n_tokens, dim)


def frequencies(theta: float, divisors: Floats) -> Floats:
    """Radians that each pair of a head turns by per token.

    Pair j turns by theta ** (-2j / head_dim): the first fast, as a second hand, the last so slowly that it tells the
    beginning of a book from its end. Models made for longer texts slow the slow ones further, by `divisors`.
    """
    j = np.arange(len(divisors), dtype=np.float32)  # (head_dim / 2,)
    return np.float32(theta) ** (-j / np.float32(len(divisors))) / divisors  # (head_dim / 2,)


def angles(positions: Ids, frequency: Floats) -> tuple[Floats, Floats]:
    """Cosine and sine of the angle of each pair at each position."""
    angle = positions[:, None].astype(np.float32) * frequency  # (n_tokens, head_dim / 2)
    return np.cos(angle)[:, None], np.sin(angle)[:, None]  # (n_tokens, 1, head_dim / 2) each


def rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotary embedding: turns each pair of neighbours (2j, 2j + 1) of every head by its angle.

    The product of a query and a key that are turned so depends on how far apart they stand, not on where.
    """
    even, odd = x[..., 0::2], x[..., 1::2]  # (n_tokens, n_heads, head_dim / 2) each
    turned = np.empty_like(x)  # (n_tokens, n_heads, head_dim)
    turned[..., 0::2] = even * cos - odd * sin
    turned[..., 1::2] = even * sin + odd * cos
    return turned


def softmax(scores: Floats) -> Floats:
    """Positive numbers that add up to one along the last axis, and grow with exp(score)."""
    exp: Floats = np.exp(scores - scores.max(axis=-1, keepdims=True))  # (..., n_ctx)
    exp /= exp.sum(axis=-1, keepdims=True)
    return exp


def attention(x: Floats, layer: Layer, h: Hyperparameters, cos: Floats, sin: Floats, cache: Cache, n: int) -> Floats:
    """Each token's query looks for keys like itself among the tokens up to it, and takes the mean of their values.

    n: the layer's number. Its keys and values go into the cache.
    """
    n_tokens, n_past = len(x), cache.n_past
    n_ctx, group = n_past + n_tokens, h.n_heads // h.n_kv_heads

    q = matmul(layer.wq, x).reshape(n_tokens, h.n_heads, h.head_dim)  # (n_tokens, n_heads, head_dim)
    k = matmul(layer.wk, x).reshape(n_tokens, h.n_kv_heads, h.head_dim)  # (n_tokens, n_kv_heads, head_dim)
    v = matmul(layer.wv, x).reshape(n_tokens, h.n_kv_heads, h.head_dim)  # (n_tokens, n_kv_heads, head_dim)
    q = rotate(q, cos, sin)  # (n_tokens, n_heads, head_dim)
    k = rotate(k, cos, sin)  # (n_tokens, n_kv_heads, head_dim)

    cache.keys[n, :, n_past:n_ctx] = k.swapaxes(0, 1)  # (n_kv_heads, n_tokens, head_dim)
    cache.values[n, :, n_past:n_ctx] = v.swapaxes(0, 1)  # (n_kv_heads, n_tokens, head_dim)
    keys = cache.keys[n, :, None, :n_ctx]  # (n_kv_heads, 1, n_ctx, head_dim)
    values = cache.values[n, :, None, :n_ctx]  # (n_kv_heads, 1, n_ctx, head_dim)

    # Query heads lie group by group: head i looks into key head i // group.
    grouped = q.reshape(n_tokens, h.n_kv_heads, group, h.head_dim)  # (n_tokens, n_kv_heads, group, head_dim)
    grouped = grouped.transpose(1, 2, 0, 3)  # (n_kv_heads, group, n_tokens, head_dim)
    scores = grouped @ keys.swapaxes(2, 3) / np.float32(math.sqrt(h.head_dim))  # (n_kv_heads, group, n_tokens, n_ctx)
    weights = softmax(scores + future(n_tokens, n_past))  # (n_kv_heads, group, n_tokens, n_ctx)
    found = weights @ values  # (n_kv_heads, group, n_tokens, head_dim)
    found = found.transpose(2, 0, 1, 3).reshape(n_tokens, h.n_heads * h.head_dim)  # (n_tokens, n_heads * head_dim)
    return matmul(layer.wo, found)  # (n_tokens, dim)


def future(n_tokens: int, n_past: int) -> Floats:
    """What is added to scores so that no token sees a later one: minus infinity there, zero elsewhere."""
    hidden = np.full((n_tokens, n_past + n_tokens), -np.inf, np.float32)  # (n_tokens, n_ctx)
    return np.triu(hidden, k=n_past + 1)  # (n_tokens, n_ctx)


def silu(x: Floats) -> Floats:
    """x where it is large, zero where it is very negative, and smooth between."""
    smooth: Floats = x / (1 + np.exp(-x))  # (n_tokens, hidden_dim)
    return smooth


def feed_forward(x: Floats, layer: Layer) -> Floats:
    """Each token by itself: w1 opens or shuts the gates on what w3 makes of it, w2 brings it back to dim numbers."""
    gate = silu(matmul(layer.w1, x))  # (n_tokens, hidden_dim)
    up = matmul(layer.w3, x)  # (n_tokens, hidden_dim)
    return matmul(layer.w2, gate * up)  # (n_tokens, dim)


def forward(
    model: Model, ids: Ids, cache: Cache, *, last_only: bool = False, on_layer: OnLayer | None = None
) -> Floats:
    """The logits (n_tokens, vocab_size) that follow each of `ids`, which come after those in the cache.

    last_only: only those after the last token, (1, vocab_size). on_layer(n, x): is shown the residual stream
    (n_tokens, dim) after layer n, counted from 0.
    Raises UsageError when the cache has no room for the tokens, FormatError for an id without an embedding and when
    the weights make a number that is not finite, naming the layer where it first appears.
    """
    h = model.hparams
    n_ctx = cache.n_past + len(ids)
    if n_ctx > cache.capacity:
        raise UsageError(f"{n_ctx} tokens are more than the {cache.capacity} that the context holds")

    with np.errstate(all="ignore"):  # numbers that are not finite are looked for, and reported, in `finite`
        x = embed(model, ids)  # (n_tokens, dim)
        frequency = frequencies(h.rope_theta, model.rope_divisors)  # (head_dim / 2,)
        cos, sin = angles(np.arange(cache.n_past, n_ctx), frequency)  # (n_tokens, 1, head_dim / 2) each
        for n, layer in enumerate(model.layers):
            x = x + attention(rms_norm(x, layer.attention_norm, h.norm_eps), layer, h, cos, sin, cache, n)
            x = x + feed_forward(rms_norm(x, layer.ffn_norm, h.norm_eps), layer)  # (n_tokens, dim)
            finite(x, f"layer {n}")
            if on_layer is not None:
                on_layer(n, x)
        cache.n_past = n_ctx
        if last_only:
            x = x[-1:]  # (1, dim)
        return finite(matmul(model.output, rms_norm(x, model.norm, h.norm_eps)), "the logits")


def embed(model: Model, ids: Ids) -> Floats:
    """The vector of each token. Raises FormatError for an id that has none."""
    wrong = ids[(ids < 0) | (ids >= model.hparams.vocab_size)]
    if wrong.size:
        raise FormatError(
            f"token id {wrong[0]} is outside the vocabulary of {model.hparams.vocab_size}",
            where=f"tensor {model.tok_embeddings.name!r}",
        )
    return finite(model.tok_embeddings.pick(ids), "the embedding")  # (n_tokens, dim)


def finite(x: Floats, where: str) -> Floats:
    """x itself. Raises FormatError when it holds NaN or infinity."""
    sound = np.isfinite(x).all(axis=-1)  # (n_tokens,)
    if not sound.all():
        raise FormatError(
            f"NaN or infinity first appears here, at token {np.argmin(sound)} of {len(x)}",
            where=where,
            todo="The weights are damaged, or not those of a LLaMA",
        )
    return x
