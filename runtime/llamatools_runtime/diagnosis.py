"""Why two models differ: the mistakes that conversions and quantizers make, each tried on what both models computed.

Every one of them has happened in public: rows of q and k in the other order (llama.cpp#2376, transformers#31766),
permuted as though there were as many key heads as query heads (llama.cpp#3364), rope factors missing (llama.cpp#8650),
shards joined along the wrong axis (CTranslate2#1127).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from llamatools.dtypes import DType, Floats
from llamatools.names import EMBEDDING, meta_to_gguf

from .model import Model
from .tolerance import EXACT, ROUNDED
from .weights import Ids, Matrix

SHIFTS = 256  # rows that an embedding is looked for above and below its own
SHARDS = (2, 4, 8)
ROWS = 64  # of a matrix, of which its weights' error is taken
UNLIKE = 0.7  # relative error from which weights are others, and no longer the same rounded; of unrelated ones, 1.4


@dataclass(frozen=True)
class Cause:
    """A known mistake. code: its short name. what: a sentence. tensors: whose mistake it is, none for a constant's."""

    code: str
    what: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """A matrix in both models, and what both make of one input (n_tokens, n_out). role: Meta's name of it."""

    role: str
    matrix: Matrix
    other: Matrix
    y: Floats
    other_y: Floats


def relative(found: ArrayLike, expected: ArrayLike) -> float:
    """How large the difference is beside what is expected, by their norms; where nothing differs, 0."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    difference, scale = float(np.linalg.norm(found - expected)), float(np.linalg.norm(expected))
    return 0.0 if difference == 0 else difference / scale if scale else np.inf


def explained(a: DType, b: DType) -> float:
    """The largest relative difference that rounding to these two dtypes explains (tolerance.py)."""
    if a is b and not a.is_quantized:
        return EXACT
    return max(EXACT, ROUNDED[a.name].weights + ROUNDED[b.name].weights)


def of_constants(model: Model, other: Model, growth: str) -> Iterator[Cause]:
    """Numbers that enter the formulas. growth: how the difference grows with position, as a clause."""
    h, o = model.hparams, other.hparams
    if np.float32(h.norm_eps) != np.float32(o.norm_eps):
        yield Cause("norm-eps", f"norm_eps is {h.norm_eps:.3g}, the other's {o.norm_eps:.3g}")
    if np.float32(h.rope_theta) != np.float32(o.rope_theta):
        yield Cause("rope-theta", f"rope_theta is {h.rope_theta:.9g}, the other's {o.rope_theta:.9g}{growth}")
    ours, theirs = model.rope_divisors, other.rope_divisors
    apart = np.flatnonzero(np.abs(ours / theirs - 1) > 1e-5)
    if apart.size:
        pairs = f"pair {apart[0]}" if apart.size == 1 else f"{apart.size} pairs from {apart[0]} on"
        if (ours == 1).all():
            how = f"rope factors are missing: the other slows {pairs} by up to {theirs.max():.4g}"
        elif (theirs == 1).all():
            how = f"rope factors that the other has not slow {pairs} by up to {ours.max():.4g}"
        else:
            how = f"rope factors are others: {pairs} slowed by up to {ours.max():.4g}, not {theirs.max():.4g}"
        yield Cause("rope-factors", how + growth)


def of_embedding(model: Model, other: Model, ids: Ids) -> Cause | None:
    """Whether the rows of the embedding stand in other places, all by the same distance."""
    a, b = model.tok_embeddings, other.tok_embeddings
    bound = explained(a.dtype, b.dtype)
    ids = np.unique(ids)
    wrong = ids[_apart(a.pick(ids), b.pick(ids)) > bound]
    for shift in sorted(range(-SHIFTS, SHIFTS + 1), key=abs):
        here = wrong[(wrong + shift >= 0) & (wrong + shift < b.shape[0])][:ROWS]
        # A row that was lost, or is one too many, is found nowhere.
        if here.size and shift and np.mean(_apart(a.pick(here), b.pick(here + shift)) <= bound) > 0.8:
            first = _first_shifted(a, b, shift, bound)
            what = f"row n holds the other's row n {'+' if shift > 0 else '-'} {abs(shift)}, from row {first} on"
            return Cause("shifted-rows", what, (meta_to_gguf(EMBEDDING),))
    return None


def _apart(x: Floats, y: Floats) -> Floats:
    """The relative difference of each row (n_rows,)."""
    return np.array([relative(*rows) for rows in zip(x, y, strict=True)], np.float32)


def _first_shifted(a: Matrix, b: Matrix, shift: int, bound: float) -> int:
    """The first row of a that is not b's, but b's `shift` rows further."""
    low, high = max(0, -shift), min(a.shape[0], b.shape[0] - shift)
    for start in range(low, high, ROWS):
        rows = np.arange(start, min(start + ROWS, high))
        x = a.pick(rows)
        moved = (_apart(x, b.pick(rows)) > bound) & (_apart(x, b.pick(rows + shift)) <= bound)
        if moved.any():
            return int(rows[moved.argmax()])
    raise AssertionError("called where rows are shifted")


def of_matrix(seen: Seen, n_heads: int, n_kv_heads: int) -> Cause | None:
    """Whether it has the other's weights in other places. For a matrix whose output differs."""
    a, b = seen.matrix, seen.other
    bound = explained(a.dtype, b.dtype)
    if seen.role in ("wq", "wk"):
        own = n_heads if seen.role == "wq" else n_kv_heads
        for heads in dict.fromkeys((own, n_heads)):
            if a.shape[0] % (2 * heads) == 0:
                rows = hugging_face_rows(a.shape[0], heads)
                cut = "" if heads == own else f" as of {heads} heads, where there are {own}"
                if relative(seen.y, seen.other_y[:, rows]) <= bound:
                    what = f"rows are in Hugging Face's order{cut}, the other's in Meta's"
                    return Cause("row-order", what, (a.name,))
                if relative(seen.other_y, seen.y[:, rows]) <= bound:
                    what = f"rows are in Meta's order, the other's in Hugging Face's{cut}"
                    return Cause("row-order", what, (a.name,))
    for n in SHARDS:
        for axis, how in ((1, "rows, where they are parts of columns"), (0, "columns, where they are parts of rows")):
            if relative(a.pick(_sample(a)), _wrongly_joined(b, n, axis)) <= bound:
                return Cause("wrong-axis", f"{n} shards were joined by {how}", (a.name,))
            if relative(b.pick(_sample(b)), _wrongly_joined(a, n, axis)) <= bound:
                return Cause("wrong-axis", f"the other's {n} shards were joined by {how}", (a.name,))
    return None


def of_weights(name: str, dtypes: tuple[str, ...], error: float, usual: float) -> Cause:
    """A tensor whose weights are off by `error`, where those of its like are off by `usual`."""
    if len(set(dtypes)) > 1 and error < UNLIKE:
        rounded = max(dtypes, key=lambda dtype: ROUNDED[dtype])
        what = f"badly quantized: as {rounded}, its weights are off by {error:.1%}, those of its like by {usual:.1%}"
        return Cause("badly-quantized", what, (name,))
    return Cause("other-weights", f"weights are not the other's: off by {error:.1%}", (name,))


def hugging_face_rows(n_rows: int, n_heads: int) -> Ids:
    """Which of Meta's rows make Hugging Face's: of each head first those of all even places, then of all odd ones."""
    return np.arange(n_rows).reshape(n_heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _wrongly_joined(matrix: Matrix, n: int, axis: int) -> Floats:
    """Sampled rows of what comes of cutting it into n shards along `axis` and joining them along the other.

    The result, which has another shape, is read on in the matrix's own. Empty where it does not divide.
    """
    n_out, n_in = matrix.shape
    r = _sample(matrix)
    if matrix.shape[axis] % n:
        return np.full((len(r), n_in), np.inf, np.float32)
    if axis == 0:
        return matrix.pick(r % n * (n_out // n) + r // n)
    parts = [
        np.take_along_axis(
            matrix.pick(place % n_out).reshape(len(r), n, n_in // n), (place // n_out)[:, None, None], axis=1
        )[:, 0]
        for place in (r * n + j for j in range(n))
    ]  # n of (n_rows, n_in / n)
    return np.concatenate(parts, axis=1)


def _sample(matrix: Matrix) -> Ids:
    """Rows that are spread evenly over it."""
    return np.unique(np.linspace(0, matrix.shape[0] - 1, ROWS).astype(np.int64))


def weights_error(a: Matrix, b: Matrix) -> float:
    """The relative difference of their weights, of a sample of rows."""
    rows = _sample(b)
    return relative(a.pick(rows), b.pick(rows))
