"""What is derived of importance against the mean squares that an imatrix would hold."""

from __future__ import annotations

import numpy as np
import pytest

from llamatools import dtypes
from llamatools.importance import of_the_head
from llamatools.layout import PlacedTensor
from llamatools.tensors import ArrayTensor

DIM = 64
RANDOM = np.random.default_rng(11)
INNER, OUTER = (RANDOM.uniform(0.1, 3, DIM).astype(np.float32) for _ in range(2))
STATES = RANDOM.standard_normal((500, DIM)).astype(np.float32) * np.geomspace(0.1, 10, DIM).astype(np.float32)
NORMALIZED = STATES / np.sqrt((STATES**2).mean(1, keepdims=True))
READ_BY_LAST = ((NORMALIZED * INNER) ** 2).mean(0)
READ_BY_HEAD = ((NORMALIZED * OUTER) ** 2).mean(0)


def model(*names: str) -> list[PlacedTensor]:
    arrays = {"blk.1.ffn_norm.weight": INNER, "output_norm.weight": OUTER}
    tensors = []
    for name in names:
        array = ArrayTensor(name, dtypes.F32, arrays.get(name, np.ones((3, DIM), np.float32)))
        tensors.append(PlacedTensor(name, array.dtype, array.shape, 0, array.nbytes, source=array))
    return tensors


NAMES = ("token_embd.weight", "blk.0.ffn_norm.weight", "blk.1.ffn_norm.weight", "output_norm.weight")


@pytest.mark.parametrize(("names", "head"), [(NAMES, NAMES[0]), ((*NAMES, "output.weight"), "output.weight")])
def test_the_heads_importance_is_what_it_reads(names: tuple[str, ...], head: str) -> None:
    derived = of_the_head({"blk.1.ffn_gate.weight": READ_BY_LAST}, model(*names))
    assert list(derived) == [head]
    np.testing.assert_allclose(derived[head], READ_BY_HEAD, rtol=1e-4)


def test_nothing_is_derived_where_it_is_known_or_cannot_be() -> None:
    known = {"token_embd.weight": READ_BY_HEAD, "blk.1.ffn_gate.weight": READ_BY_LAST}
    assert of_the_head(known, model(*NAMES)) == {}
    assert of_the_head({"blk.0.ffn_gate.weight": READ_BY_LAST}, model(*NAMES)) == {}
    assert of_the_head({"blk.1.ffn_gate.weight": READ_BY_LAST[:32]}, model(*NAMES)) == {}
    assert of_the_head({"blk.1.ffn_gate.weight": READ_BY_LAST}, model(*NAMES[:3])) == {}
