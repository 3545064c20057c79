"""LLaMA on one page: from token ids to logits, the scores of every token that could come next.

Read `forward` at the end first; what it calls stands above it. A token is a vector of `dim` numbers, the residual
stream `x`. Every layer adds two things to it: what the token gathers from earlier tokens (`attention`), and what it
makes of that by itself (`feed_forward`). After the last layer the vector is compared with every token's own (`output`).

The comment on a line is the shape of what it assigns:
    n_tokens    tokens computed at once: a prompt's, or one
    n_past      tokens whose keys and values the cache held before
    n_ctx       n_past + n_tokens

Names are Meta's (llama-models, models/llama3/model.py). Numbers are float32, whatever the file
stores, but in the cache. Speed is made elsewhere: products of matrices in weights.py, the steps between in fused.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamatools.checkpoint import Hyperparameters
from llamatools.dtypes import Floats
from llamatools.errors import FormatError, UsageError

from .cache import Cache
from .fused import add, attend, keep, rms_norm, rotate, silu_times
from .kernels.recorded import Recorded
from .weights import Ids, Matrix, matmul, matmuls

Turns = NDArray[np.complex64]
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
    float32: bool = False  # no activations in eight bits, no keys and values in float16: for comparison


def frequencies(theta: float, divisors: Floats) -> Floats:
    """Radians that each pair of a head turns by per token.

    Pair j turns by theta ** (-2j / head_dim): the first fast, as a second hand, the last so slowly that it tells the
    beginning of a book from its end. Models made for longer texts slow the slow ones further, by `divisors`.
    """
    j = np.arange(len(divisors), dtype=np.float32)  # (head_dim / 2,)
    return np.float32(theta) ** (-j / np.float32(len(divisors))) / divisors  # (head_dim / 2,)


def turns(positions: Ids, frequency: Floats) -> Turns:
    """The angle of each pair at each position, as the complex number that turns by it: cos + i sin."""
    angle = positions[:, None].astype(np.float32) * frequency  # (n_tokens, head_dim / 2)
    turn: Turns = np.cos(angle) + 1j * np.sin(angle)  # (n_tokens, head_dim / 2)
    return turn


def attention(x: Floats, layer: Layer, h: Hyperparameters, turn: Turns, cache: Cache, n: int) -> Floats:
    """Each token's query looks for keys like itself among the tokens up to it, and takes the mean of their values.

    n: the layer's number. Its keys and values go into the cache.
    """
    n_tokens = len(x)

    q, k, v = matmuls([layer.wq, layer.wk, layer.wv], x)  # (n_tokens, heads of the matrix * head_dim) each
    # Rotary embedding: each pair of neighbours (a, b) in a head is turned as the complex number a + ib. The product of
    # a query and a key that are turned so depends on how far apart they stand, not on where.
    q, k = rotate(q, turn), rotate(k, turn)  # as they were
    keep(k, v, cache, n)  # cache.keys[n] and cache.values[n], (n_kv_heads, tokens, head_dim), have n_ctx tokens now

    # For every head and token: softmax(keys @ q / sqrt(head_dim)) @ values, over the n_ctx tokens that are not later.
    # Softmax makes scores positive and sum up to one: exp(score), divided by the sum of these.
    found = attend(q.reshape(n_tokens, h.n_heads, h.head_dim), cache, n)  # (n_tokens, n_heads, head_dim)
    return matmul(layer.wo, found.reshape(n_tokens, h.n_heads * h.head_dim))  # (n_tokens, dim)


def feed_forward(x: Floats, layer: Layer) -> Floats:
    """Each token by itself: w1 opens or shuts the gates on what w3 makes of it, w2 brings it back to dim numbers."""
    gate, up = matmuls([layer.w1, layer.w3], x)  # (n_tokens, hidden_dim) each
    # silu(gate) * up. Silu is gate / (1 + exp(-gate)): gate where it is large, zero where it is very negative.
    gated = silu_times(gate, up)  # (n_tokens, hidden_dim)
    return matmul(layer.w2, gated)  # (n_tokens, dim)


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
        turn = turns(np.arange(cache.n_past, n_ctx), frequency)  # (n_tokens, head_dim / 2)
        if len(ids) == 1 and on_layer is None:
            logits = one_more(model, x, turn, cache)  # (1, vocab_size)
        else:
            logits = through_layers(model, x, turn, cache, last_only, on_layer)  # (n_tokens, vocab_size)
        cache.n_past = n_ctx
        return logits


def through_layers(
    model: Model, x: Floats, turn: Turns, cache: Cache, last_only: bool = False, on_layer: OnLayer | None = None
) -> Floats:
    """From embeddings x (n_tokens, dim) to logits, see `forward`."""
    h = model.hparams
    for n, layer in enumerate(model.layers):
        normed = rms_norm(x, layer.attention_norm, h.norm_eps)  # (n_tokens, dim)
        x = add(x, attention(normed, layer, h, turn, cache, n))  # (n_tokens, dim)
        normed = rms_norm(x, layer.ffn_norm, h.norm_eps)  # (n_tokens, dim)
        x = add(x, feed_forward(normed, layer))  # (n_tokens, dim)
        finite(x, f"layer {n}")
        if on_layer is not None:
            on_layer(n, x)
    if last_only:
        x = x[-1:]  # (1, dim)
    return finite(matmul(model.output, rms_norm(x, model.norm, h.norm_eps)), "the logits")  # (n_tokens, vocab_size)


def one_more(model: Model, x: Floats, turn: Turns, cache: Cache) -> Floats:
    """`through_layers` of a single token; all at once if it is not the first, see kernels/recorded.py."""
    if cache.last_steps is None or cache.last_steps[0] is not model:
        steps = Recorded(lambda x, turn: through_layers(model, x, turn, cache), x, turn)
        cache.last_steps = model, steps
        return steps.result.copy()
    steps = cache.last_steps[1]
    if steps.is_whole:
        logits = steps.again(x, turn)
        if math.isfinite(logits.sum()):
            return logits
    return through_layers(model, x, turn, cache)  # which names the layer that makes what is not finite


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
    if math.isfinite(x.sum()):  # which NaN or infinity would pass on to the sum
        return x
    sound = np.isfinite(x).all(axis=-1)  # (n_tokens,)
    if not sound.all():
        raise FormatError(
            f"NaN or infinity first appears here, at token {np.argmin(sound)} of {len(x)}",
            where=where,
            todo="The weights are damaged, or not those of a LLaMA",
        )
    return x
