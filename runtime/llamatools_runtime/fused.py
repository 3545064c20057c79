"""The steps between the products of matrices, each in one pass over memory: norms, sums, gates, attention.

What they compute is said in model.py, how in kernels/pointwise.py and kernels/attention.py. The team of threads shares
the work where there are many tokens, or much to read.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llamatools.dtypes import Floats
from llamatools.dtypes.compiled import INTEGER

from .kernels.job import N_FIELDS
from .kernels.recorded import cannot_record, record
from .kernels.team import kernel, team

if TYPE_CHECKING:
    from .cache import Cache

TOKENS = 8  # that a thread takes at a time


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / sqrt(mean(x ** 2) + eps) * weight, of each token: (n_tokens, dim) -> (n_tokens, dim)."""
    weight = np.ascontiguousarray(weight)
    return _each_token("norm", x, _at(weight), _bits(eps), uses=weight)


def silu_times(x: Floats, up: Floats) -> Floats:
    """silu(x) * up, where silu(x) = x / (1 + exp(-x)): (n_tokens, n) twice -> (n_tokens, n)."""
    up = _rows(up)
    return _each_token("gate", x, _at(up), up.strides[0] // 4, uses=up)


def add(x: Floats, other: Floats) -> Floats:
    """x + other: (n_tokens, n) twice -> (n_tokens, n)."""
    other = _rows(other)
    return _each_token("add", x, _at(other), other.strides[0] // 4, uses=other)


def rotate(x: Floats, turn: NDArray[np.complex64]) -> Floats:
    """Each pair of neighbours (2j, 2j + 1) of every head turned, as a complex number, by turn[token, j].

    x: (n_tokens, n_heads * head_dim), turn: (n_tokens, head_dim / 2); returns (n_tokens, n_heads * head_dim).
    """
    return _each_token("rotate", x, _at(turn), 2 * turn.shape[1], uses=turn)


def _each_token(name: str, x: Floats, *numbers: int, uses: NDArray[Any]) -> Floats:
    """What the kernel makes of each token of x, (n_tokens, n) -> (n_tokens, n). numbers: its fields after N."""
    x = _rows(x)
    y = np.empty(x.shape, np.float32)
    fields = [_at(x), x.strides[0] // 4, _at(y), x.shape[1], *numbers]
    _run(f"pointwise.{name}", len(x), TOKENS, fields, (x, y, uses))
    return y


def keep(k: Floats, v: Floats, cache: Cache, n: int) -> None:
    """Puts keys and values (n_tokens, n_kv_heads * head_dim) of new tokens into the cache's layer n."""
    n_kv_heads, capacity, head_dim = cache.keys.shape[1:]
    for new, stored in (k, cache.stored[0, n]), (v, cache.stored[1, n]):
        new = _rows(new)
        fields = [_at(new), new.strides[0] // 4, _at(stored), 0, capacity, stored.shape[2], _at(cache.past), 0]
        fields += [n_kv_heads, head_dim]
        _run(f"attention.keep_{_kind(cache)}", len(new), TOKENS, fields, (new, stored, cache.past))


def attend(q: Floats, cache: Cache, n: int) -> Floats:
    """For each query the mean of layer n's values, by the softmax of its products with the keys up to its own token.

    q: (n_tokens, n_heads, head_dim), of the last tokens in the cache's layer, which are beyond cache.n_past; returns
    the same shape. Products are divided by sqrt(head_dim). Head i looks into the keys of head i // group.
    """
    n_tokens, n_heads, head_dim = q.shape
    _, n_kv_heads, capacity, width = cache.stored.shape[1:]
    group = n_heads // n_kv_heads
    if head_dim < width:
        cannot_record()
        q = np.pad(q, ((0, 0), (0, 0), (0, width - head_dim)))
    q, found = np.ascontiguousarray(q), np.empty((n_tokens, n_heads, width), np.float32)
    fields = [_at(q), _at(found), *(_at(cache.stored[i, n]) for i in (0, 1)), capacity, width, _at(cache.past)]
    uses, scale = (q, found, cache.stored, cache.past), _bits(head_dim**-0.5)
    if n_tokens == 1:
        scores = cache.scores(n_heads)
        fields += [scores.shape[1], n_heads, group, scale, _at(scores)]
        alone = cache.n_past < ALONE // group
        _run(f"attention.one_token_{_kind(cache)}", n_kv_heads, 1, fields, (*uses, scores), alone=alone)
    else:
        n_tiles = n_kv_heads * -(-n_tokens * group // 16)
        _run(f"attention.many_tokens_{_kind(cache)}", n_tiles, 1, [*fields, n_tokens, n_heads, group, scale], uses)
    return found[..., :head_dim]


ALONE = 256  # scores per head of keys up to which one thread is faster than two that have to be told


def _kind(cache: Cache) -> str:
    return "f16" if cache.stored.dtype == np.float16 else "f32"


def _run(
    name: str, n_rows: int, grain: int, fields: list[int], uses: tuple[NDArray[Any], ...], *, alone: bool = False
) -> None:
    """Rows 0 to n_rows by the kernel, shared among the team if they are more than `grain`, and unless `alone`.

    fields: those of the job from 4 on. uses: the memory that they are addresses in.
    """
    address, function = _entry(name)
    job = array("q", [address, n_rows, grain, 0, *fields, *[0] * (N_FIELDS - 4 - len(fields))])
    assert len(job) == N_FIELDS
    record(job, uses)
    if n_rows <= grain or alone:
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
