"""The steps between the products of matrices, each in one pass over memory: norms, gates, attention over the cache.

What they compute is said in model.py, how in kernels/pointwise.py and kernels/attention.py. The team of threads shares
the work where there are many tokens, or much to read.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from llamatools.dtypes import Floats
from llamatools.dtypes.compiled import INTEGER

from .kernels.job import N_FIELDS
from .kernels.team import kernel, team

if TYPE_CHECKING:
    from .cache import Cache

TOKENS = 8  # that a thread takes at a time


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / sqrt(mean(x ** 2) + eps) * weight, of each token: (n_tokens, dim) -> (n_tokens, dim)."""
    n_tokens, dim = x.shape
    x, weight = _rows(x), np.ascontiguousarray(weight)
    y = np.empty((n_tokens, dim), np.float32)
    _run("pointwise.norm", n_tokens, TOKENS, _at(x), x.strides[0] // 4, _at(y), dim, _at(weight), _bits(eps))
    return y


def silu_times(x: Floats, up: Floats) -> Floats:
    """silu(x) * up, where silu(x) = x / (1 + exp(-x)): (n_tokens, n) twice -> (n_tokens, n)."""
    n_tokens, n = x.shape
    x, up = _rows(x), _rows(up)
    y = np.empty((n_tokens, n), np.float32)
    _run("pointwise.gate", n_tokens, TOKENS, _at(x), x.strides[0] // 4, _at(y), n, _at(up), up.strides[0] // 4)
    return y


def attend(q: Floats, cache: Cache, n: int) -> Floats:
    """For each query the mean of layer n's values, by the softmax of its products with the keys up to its own token.

    q: (n_tokens, n_heads, head_dim), of the last tokens in the cache's layer, which are beyond cache.n_past; returns
    the same shape. Products are divided by sqrt(head_dim). Head i looks into the keys of head i // group.
    """
    n_tokens, n_heads, head_dim = q.shape
    _, n_kv_heads, capacity, width = cache.stored.shape[1:]
    group, n_past = n_heads // n_kv_heads, cache.n_past
    q = np.ascontiguousarray(q) if head_dim == width else np.pad(q, ((0, 0), (0, 0), (0, width - head_dim)))
    found = np.empty((n_tokens, n_heads, width), np.float32)
    of_both, of_layers = cache.stored.strides[:2]
    keys, values = (_at(cache.stored) + i * of_both + n * of_layers for i in (0, 1))
    kind = "f16" if cache.stored.dtype == np.float16 else "f32"
    shared = [_at(q), _at(found), keys, values, capacity, width, n_past]
    scale = _bits(head_dim**-0.5)
    if n_tokens == 1:
        stride = -(-(n_past + 1) // 16) * 16
        scores = np.empty((n_heads, stride), np.float32)
        grain = n_kv_heads if n_past < ALONE // group else 1
        _run(f"attention.one_token_{kind}", n_kv_heads, grain, *shared, stride, n_heads, group, scale, _at(scores))
    else:
        n_tiles = n_kv_heads * -(-n_tokens * group // 16)
        _run(f"attention.many_tokens_{kind}", n_tiles, 1, *shared, n_tokens, n_heads, group, scale)
    return found[..., :head_dim]


ALONE = 256  # scores per head of keys up to which one thread is faster than two that have to be told


def _run(name: str, n_rows: int, grain: int, *numbers: int) -> None:
    """Rows 0 to n_rows by the kernel, shared among the team if they are more than `grain`."""
    address, function = _entry(name)
    job = array("q", [address, n_rows, grain, 0, *numbers, *[0] * (N_FIELDS - 4 - len(numbers))])
    if n_rows <= grain:
        function(job.buffer_info()[0], 0, n_rows)
    else:
        team().run(job)


@cache
def _entry(name: str) -> tuple[int, Callable[..., object]]:
    """A kernel of a job and a range of rows: its address, for the team, and as a function."""
    return kernel(name).address((INTEGER,) * 3), kernel(name).of_integers(3)


def _rows(x: Floats) -> Floats:
    """x with the numbers of a token one after the other; tokens may be further apart."""
    return x if x.strides[-1] == 4 else np.ascontiguousarray(x)


def _at(array: np.ndarray) -> int:
    """The address of its first item."""
    address: int = array.__array_interface__["data"][0]
    return address


@cache
def _bits(number: float) -> int:
    """Those of a float32, as kernels are told of one."""
    return int(np.float32(number).view(np.int32))
