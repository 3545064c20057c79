"""The keys and values of the tokens so far, so that each is computed once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamatools.checkpoint import Hyperparameters
from llamatools.dtypes import Floats
from llamatools.errors import SpaceError

from .kernels.recorded import Recorded
from .room import available_memory


class Cache:
    """Keys and values, float16 or float32, of up to `capacity` tokens, of which n_past are there.

    keys, values: (n_layers, n_kv_heads, capacity, head_dim), views of `stored`, (2, n_layers, n_kv_heads, capacity,
    width), in which heads are filled up with zeros to a width that divides by 16. Memory is taken as it is filled.
    past: n_past, where kernels find it. last_steps: a model, and what it did to the last single token (model.py).
    """

    def __init__(self, stored: NDArray[Any], head_dim: int) -> None:
        self.stored = stored
        self.keys, self.values = stored[..., :head_dim]
        self.capacity = int(stored.shape[3])
        self.past = np.zeros(1, np.int64)
        self.last_steps: tuple[object, Recorded] | None = None
        self._scores = np.empty((0, 0), np.float32)

    @property
    def n_past(self) -> int:
        return int(self.past[0])

    @n_past.setter
    def n_past(self, n_tokens: int) -> None:
        self.past[0] = n_tokens

    def scores(self, n_heads: int) -> Floats:
        """Memory for each head's score of every token: (n_heads, capacity or a few more), always the same."""
        if len(self._scores) != n_heads:
            self._scores = np.empty((n_heads, (self.capacity // 16 + 2) * 16), np.float32)
        return self._scores

    @classmethod
    def of(cls, hparams: Hyperparameters, n_tokens: int | None = None, *, float32: bool = False) -> Cache:
        """A cache for n_tokens, at most and by default the model's whole context, in float16 if not float32.

        Raises SpaceError when that is more memory than there is.
        """
        h = hparams
        capacity = h.max_seq_len if n_tokens is None else min(n_tokens, h.max_seq_len)
        dtype = np.dtype(np.float32 if float32 else np.float16)
        shape = (2, h.n_layers, h.n_kv_heads, capacity, -(-h.head_dim // 16) * 16)
        nbytes, available = math.prod(shape) * dtype.itemsize, available_memory()
        try:
            if available is not None and nbytes > available:
                raise MemoryError
            return cls(np.zeros(shape, dtype), h.head_dim)
        except (MemoryError, ValueError) as error:  # ValueError: more bytes than there are addresses
            there_are = "more than there are" if available is None else f"of which {max(available, 0)} are available"
            raise SpaceError(
                f"the keys and values of {capacity} tokens take {nbytes} bytes of memory, {there_are}",
                todo="Ask for fewer tokens",
            ) from error
