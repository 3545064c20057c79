"""Attention over a cache of keys and values, without ever having all scores of a prompt in memory.

A cache is float16 or float32 and holds, for each head of keys, the tokens one after the other, `width` numbers each.
`group` query heads share a head of keys. Two kernels, since what is scarce differs:

    one token     reading the cache from memory, once; lanes are numbers of a head, a key's score is a sum across them
    many tokens   arithmetic; lanes are sixteen queries (tokens, and heads of a group), nothing is summed across them
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llamatools.dtypes.simd import (
    LANE,
    F32x16,
    I32x16,
    I64x16,
    U16x16,
    array_at,
    bitcast,
    convert,
    half_to_float,
    inlined,
    kernel,
    lanes_of,
    load,
    load_transposed,
    maximum,
    minimum,
    multiply_add,
    reduce_add,
    reduce_max,
    scratch,
    select,
    splat,
    store,
    store_half,
    store_transposed,
)

from .pointwise import exp

# Fields of a job from 4 on, see job.py
Q = 4  # float32 (n_tokens, n_heads, width)
FOUND = 5  # likewise, to write
KEYS, VALUES = 6, 7  # of the first head of the layer, (n_kv_heads, capacity, width)
CAPACITY, WIDTH = 8, 9  # width: a multiple of 16, at most MAX_WIDTH
PAST, N_TOKENS = 10, 11  # where the number of tokens before these is, an int64
N_HEADS, GROUP = 12, 13
SCALE = 14  # of scores, the bits of a float32
SCORES, SCORES_STRIDE = 15, 11  # of one token: float32 (n_heads, stride), the stride being n_ctx or more, and of 16
# Of keep, beside CAPACITY, WIDTH and PAST
NEW, NEW_STRIDE = 4, 5  # float32 (n_tokens, n_kv_heads * head_dim), and floats from a token to the next
STORED = 6  # the keys, or the values, of the first head of the layer
N_KV_HEADS, HEAD_DIM = 12, 13

f32 = np.float32
MAX_WIDTH = 256
BLOCK = 32  # keys that many tokens look at before the next: as floats they stay in the nearest cache


@inlined
def _halves(array: Any, i: int) -> Any:
    return half_to_float(load(U16x16, array, i))


@inlined
def _floats(array: Any, i: int) -> Any:
    return load(F32x16, array, i)


@inlined
def _put_half(array: Any, i: int, number: Any) -> None:
    store_half(array, i, number)


@inlined
def _put_float(array: Any, i: int, number: Any) -> None:
    array[i] = number


@kernel
def keep_f16(job: int, start: int, stop: int) -> None:
    """Puts the keys, or the values, of the new tokens start to stop into the cache."""
    _keep(job, start, stop, U16x16, _put_half)


@kernel
def keep_f32(job: int, start: int, stop: int) -> None:
    """Puts the keys, or the values, of the new tokens start to stop into the cache."""
    _keep(job, start, stop, F32x16, _put_float)


@inlined
def _keep(job: int, start: int, stop: int, stored_as: Any, put: Any) -> None:
    fields = array_at(I64x16, job)
    new, stored = array_at(F32x16, fields[NEW]), array_at(stored_as, fields[STORED])
    n_past = array_at(I64x16, fields[PAST])[0]
    for token in range(start, stop):
        for head in range(fields[N_KV_HEADS]):
            from_ = token * fields[NEW_STRIDE] + head * fields[HEAD_DIM]
            to = (head * fields[CAPACITY] + n_past + token) * fields[WIDTH]
            for i in range(fields[HEAD_DIM]):
                put(stored, to + i, new[from_ + i])


@kernel
def one_token_f16(job: int, start: int, stop: int) -> None:
    """Heads of keys start to stop."""
    _one_token(job, start, stop, U16x16, _halves)


@kernel
def one_token_f32(job: int, start: int, stop: int) -> None:
    """Heads of keys start to stop."""
    _one_token(job, start, stop, F32x16, _floats)


@inlined
def _one_token(job: int, start: int, stop: int, stored: Any, load_floats: Any) -> None:
    fields = array_at(I64x16, job)
    keys, values = array_at(stored, fields[KEYS]), array_at(stored, fields[VALUES])
    q, found, scores = array_at(F32x16, fields[Q]), array_at(F32x16, fields[FOUND]), array_at(F32x16, fields[SCORES])
    width, group, stride = fields[WIDTH], fields[GROUP], fields[SCORES_STRIDE]
    n_ctx = array_at(I64x16, fields[PAST])[0] + 1
    scale = bitcast(F32x16, splat(I32x16, fields[SCALE]))[0]
    tile = scratch(F32x16, 16 * 16)  # sixteen keys or values as floats
    n_vectors = width // 16
    for head in range(start, stop):
        first = head * fields[CAPACITY] * width
        queries = range(head * group, (head + 1) * group)
        for k in range(0, n_ctx, 16):
            n = min(16, n_ctx - k)
            for i in range(n * n_vectors):
                tile[i] = load_floats(keys, first + k * width + 16 * i)
            for j in queries:
                for key in range(n):
                    products = splat(F32x16, 0)
                    for d in range(n_vectors):
                        products = multiply_add(
                            load(F32x16, q, j * width + 16 * d), tile[key * n_vectors + d], products
                        )
                    scores[j * stride + k + key] = reduce_add(products) * scale
        for j in queries:
            _softmax(scores, j * stride, n_ctx)
            for i in range(0, width, 16):
                store(found, j * width + i, splat(F32x16, 0))
        for k in range(0, n_ctx, 16):
            n = min(16, n_ctx - k)
            for i in range(n * n_vectors):
                tile[i] = load_floats(values, first + k * width + 16 * i)
            for j in queries:
                for d in range(n_vectors):
                    mean = load(F32x16, found, j * width + 16 * d)
                    for key in range(n):
                        mean = multiply_add(tile[key * n_vectors + d], scores[j * stride + k + key], mean)
                    store(found, j * width + 16 * d, mean)


@inlined
def _softmax(scores: Any, first: int, n: int) -> None:
    """Of the n scores from `first` on, in place; those that fill up the last sixteen become 0."""
    padded = -(-n // 16) * 16
    for k in range(n, padded):
        scores[first + k] = -np.inf
    largest = load(F32x16, scores, first)
    for k in range(16, padded, 16):
        largest = maximum(largest, load(F32x16, scores, first + k))
    most = reduce_max(largest)
    totals = splat(F32x16, 0)
    for k in range(0, padded, 16):
        weights = exp(load(F32x16, scores, first + k) - most)
        totals = totals + weights
        store(scores, first + k, weights)
    inverse = f32(1) / reduce_add(totals)
    for k in range(0, padded, 16):
        store(scores, first + k, load(F32x16, scores, first + k) * inverse)


@kernel
def many_tokens_f16(job: int, start: int, stop: int) -> None:
    """Tiles of sixteen queries, start to stop, those of the first head of keys first."""
    _many_tokens(job, start, stop, U16x16, _halves)


@kernel
def many_tokens_f32(job: int, start: int, stop: int) -> None:
    """Tiles of sixteen queries, start to stop, those of the first head of keys first."""
    _many_tokens(job, start, stop, F32x16, _floats)


@inlined
def _many_tokens(job: int, start: int, stop: int, stored: Any, load_floats: Any) -> None:
    """Per lane the softmax is computed as its scores come: what was summed is scaled down when a larger one comes.

    (Milakov and Gimelshein 2018, Online normalizer calculation for softmax.)
    """
    fields = array_at(I64x16, job)
    keys, values = array_at(stored, fields[KEYS]), array_at(stored, fields[VALUES])
    width, group, n_past = fields[WIDTH], fields[GROUP], array_at(I64x16, fields[PAST])[0]
    n_queries = fields[N_TOKENS] * group  # of a head of keys
    n_tiles = (n_queries + 15) // 16
    scale = bitcast(F32x16, splat(I32x16, fields[SCALE]))[0]
    q = scratch(F32x16, 256)  # (width, 16 queries)
    mean = scratch(F32x16, 256)  # (width, 16 queries)
    weights = scratch(F32x16, 32)  # (BLOCK, 16 queries)
    block = scratch(F32x16, 32 * 16)  # (BLOCK, width) as floats
    for tile in range(start, stop):
        head, row = tile // n_tiles, tile % n_tiles * 16
        query = minimum(LANE + row, n_queries - 1)  # the last is repeated where there are no more
        token = query // group
        starts = (token * fields[N_HEADS] + head * group + (query - token * group)) * width
        for d in range(0, width, 16):
            load_transposed(array_at(F32x16, fields[Q]), starts, q, d)
        for d in range(width):
            q[d] = q[d] * scale
            mean[d] = splat(F32x16, 0)
        last = convert(I32x16, token) + n_past  # the last key that a query sees
        largest, total = splat(F32x16, -np.inf), splat(F32x16, 0)
        first = head * fields[CAPACITY] * width
        n_ctx = n_past + min(row + 15, n_queries - 1) // group + 1
        for k in range(0, n_ctx, BLOCK):
            n = min(BLOCK, n_ctx - k)
            for i in range(0, n * width, 16):
                block[i // 16] = load_floats(keys, first + k * width + i)
            highest = _scores(q, lanes_of(block), width, k, n, last, weights, largest)
            less = exp(largest - highest)
            largest = highest
            total = total * less
            for key in range(n):
                weight = exp(weights[key] - largest)
                weights[key] = weight
                total = total + weight
            for i in range(0, n * width, 16):
                block[i // 16] = load_floats(values, first + k * width + i)
            _add_values(mean, less, weights, lanes_of(block), width, n)
        for d in range(width):
            mean[d] = mean[d] / total
        for d in range(0, width, 16):
            store_transposed(array_at(F32x16, fields[FOUND]), starts, mean, d)


@inlined
def _scores(q: Any, keys: Any, width: int, k: int, n: int, last: Any, scores: Any, largest: Any) -> Any:
    """The scores of n keys from number k on, minus infinity for those a query does not see; returns the largest yet."""
    for key in range(0, n, 4):
        a = b = c = d = splat(F32x16, 0)
        at = key * width
        for i in range(width):
            x = q[i]
            a = multiply_add(x, keys[at + i], a)
            b = multiply_add(x, keys[at + width + i], b)
            c = multiply_add(x, keys[at + 2 * width + i], c)
            d = multiply_add(x, keys[at + 3 * width + i], d)
        a, b = select(last >= k + key, a, -np.inf), select(last >= k + key + 1, b, -np.inf)
        c, d = select(last >= k + key + 2, c, -np.inf), select(last >= k + key + 3, d, -np.inf)
        scores[key], scores[key + 1], scores[key + 2], scores[key + 3] = a, b, c, d
        largest = maximum(maximum(maximum(maximum(a, largest), b), c), d)
    return largest


@inlined
def _add_values(mean: Any, less: Any, weights: Any, values: Any, width: int, n: int) -> None:
    """mean * less + weights * values, for n values."""
    for i in range(0, width, 4):
        a, b, c, d = mean[i] * less, mean[i + 1] * less, mean[i + 2] * less, mean[i + 3] * less
        for key in range(n):
            weight, at = weights[key], key * width + i
            a = multiply_add(weight, values[at], a)
            b = multiply_add(weight, values[at + 1], b)
            c = multiply_add(weight, values[at + 2], c)
            d = multiply_add(weight, values[at + 3], d)
        mean[i], mean[i + 1], mean[i + 2], mean[i + 3] = a, b, c, d
