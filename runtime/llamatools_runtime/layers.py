"""`llamatools run A --against B --layers`: where two models part, and why, if the mistake is a known one.

Both read the same tokens, each on its own: after every layer their residual streams are compared, which shows how a
difference grows. Then every matrix of both is given the same input, one that B computed, which shows where differences
come from: a matrix that makes the same of the same is not to blame. What is to blame goes through diagnosis.py.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamatools.checkpoint import Checkpoint, Hyperparameters
from llamatools.dtypes import Floats
from llamatools.errors import UsageError, in_file
from llamatools.layout import Layout
from llamatools.names import LAYER_TENSORS

from . import guard
from .cache import Cache
from .comparison import passage, without_infinities
from .diagnosis import (
    Cause,
    Seen,
    explained,
    of_constants,
    of_embedding,
    of_matrix,
    of_weights,
    relative,
    weights_error,
)
from .fused import rms_norm, silu_times
from .generation import check_prompt
from .load import load
from .model import Layer, Model, embed, forward
from .planned import model_of_checkpoint
from .text import TextCodec
from .tolerance import EXACT
from .weights import Ids, Matrix, matmul

TOKENS = 256  # of the built-in passage, at most
LOGITS = 32  # of them, the last, at which the outputs are compared
BAD, PEERS = 2.5, 4  # a tensor is rounded badly from so many times the median error of its dtypes' tensors, if so many
ROLES = {tensor.split(".")[-2]: name for tensor, name in LAYER_TENSORS.items()}  # "wq": "attn_q.weight"
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")  # in the order of execution


@dataclass(frozen=True)
class TensorDifference:
    """A tensor of both models. All differences are relative to the other's.

    name: GGUF's. dtypes: in the model and in the other; none for a vector. output: of what both make of the same
    input. weights: of a sample of its weights. explained: what rounding to these dtypes explains.
    """

    name: str
    dtypes: tuple[str, ...]
    output: float
    weights: float
    explained: float

    @property
    def differs(self) -> bool:
        return not self.output <= self.explained  # also where it is not a number


@dataclass(frozen=True)
class Parting:
    """Where two models part.

    states: relative difference of the residual stream after each layer, each model on its own; the first is that of
    the embedding. tensors: in the order of execution. causes: known mistakes that explain the differences.
    """

    n_tokens: int
    states: tuple[float, ...]
    tensors: tuple[TensorDifference, ...]
    causes: tuple[Cause, ...]

    @property
    def first(self) -> TensorDifference | None:
        """The first tensor that makes something else of the same input than its dtypes explain."""
        return next((tensor for tensor in self.tensors if tensor.differs), None)

    @property
    def same(self) -> bool:
        return self.first is None and not self.causes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {
            "tokens": self.n_tokens,
            "same": self.same,
            "first": self.first.name if self.first else None,
            "causes": [asdict(cause) for cause in self.causes],
            "states": list(self.states),
            "tensors": [asdict(tensor) | {"differs": tensor.differs} for tensor in self.tensors],
        }
        plain: dict[str, Any] = without_infinities(found)
        return plain

    def lines(self) -> list[str]:
        """For people, within 80 columns."""
        of = {tensor.name: tensor for tensor in self.tensors}
        lines = ["   layer    state" + "".join(f"{role:>8}" for role in MATRICES)]
        lines.append(f"  before {self.states[0]:8.1e}")
        for n, state in enumerate(self.states[1:]):
            row = (of[f"blk.{n}.{ROLES[role]}"].output for role in MATRICES)
            lines.append(f"{n:8} {state:8.1e}" + "".join(f" {output:7.1e}" for output in row))
        first = self.first
        if first is None:
            lines.append("every matrix makes the same of the same, as far as its types allow")
        else:
            lines.append(
                f"first to differ: {first.name}, by {first.output:.1e}; its types explain {first.explained:.1e}"
            )
        for cause in self.causes:
            subject = f"{spelled(cause.tensors)}: " if cause.tensors else ""
            lines += textwrap.wrap(f"{subject}{cause.what}", 80, initial_indent="cause: ", subsequent_indent="       ")
        return lines


def part(
    path: Path | str, against: Checkpoint, *, prompt: str | None = None, ids: Sequence[int] | None = None
) -> Parting:
    """Compares the GGUF file `path` with another model, a GGUF or a Meta checkpoint, layer by layer.

    The tokens are `ids`, or `prompt` as the model's vocabulary cuts it, or the first 256 of a built-in passage.
    Memory: the other's residual stream after every layer, n_layers * n_tokens * dim floats.
    Raises as `load` and `model_of_checkpoint`; UsageError when the two are not of one shape.
    """
    model, layout = load(path, float32=True)
    other, other_layout = model_of_checkpoint(against, float32=True)
    with in_file(path):
        _check_same_shape(model.hparams, other.hparams)
        context = min(model.hparams.max_seq_len, other.hparams.max_seq_len)
        tokens = np.array(_ids(prompt, (layout, other_layout), context) if ids is None else ids, np.int64)
        check_prompt(tokens.tolist(), context)
    with in_file(against.path):
        states = _states(other, tokens)
    with in_file(path):
        own = _states(model, tokens)
    growth = _growth(own[1], states[1])

    causes = [*of_constants(model, other, growth)]
    if shifted := of_embedding(model, other, tokens):
        causes.append(shifted)
    tensors: list[TensorDifference] = []
    for tensor, seen in _given_the_same(model, other, tokens, states):
        tensors.append(tensor)
        if tensor.differs and seen and (cause := of_matrix(seen, model.hparams.n_heads, model.hparams.n_kv_heads)):
            causes.append(cause)
    causes += _of_weights(tensors, {name for cause in causes for name in cause.tensors})
    differences = tuple(relative(x, y) for x, y in zip(own, states, strict=True))
    return Parting(len(tokens), differences, tuple(tensors), _gathered(causes))


def _check_same_shape(ours: Hyperparameters, others: Hyperparameters) -> None:
    for field in ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size"):
        a, b = getattr(ours, field), getattr(others, field)
        if a != b:
            raise UsageError(f"{field} is {a}, the other's {b}", todo="These are two different models")


def _ids(prompt: str | None, layouts: Sequence[Layout], context: int) -> Sequence[int]:
    """The tokens of the prompt, or of the passage, by the first vocabulary there is."""
    tokenizer = next((layout.tokenizer for layout in layouts if layout.tokenizer), None)
    if tokenizer is None:
        raise UsageError("neither model has a vocabulary to cut a text into tokens")
    encode = TextCodec(tokenizer).encode
    return encode(passage())[: min(TOKENS, context)] if prompt is None else encode(prompt)


def _states(model: Model, ids: Ids) -> list[Floats]:
    """The residual stream (n_tokens, dim) before the first layer and after each."""
    states = [embed(model, ids)]
    cache = Cache.of(model.hparams, len(ids), float32=True)
    forward(model, ids, cache, last_only=True, on_layer=lambda _, x: states.append(x.copy()))
    guard.check()
    return states


def _growth(x: Floats, other_x: Floats) -> str:
    """How a difference after the first layer grows along the text, as a clause; empty where it does not."""
    n = max(1, len(x) // 16)
    early, late = relative(x[:n], other_x[:n]), relative(x[-n:], other_x[-n:])
    if late <= 1.5 * early:
        return ""
    return f"; the difference grows with position: {early:.1e} in the first {n} tokens, {late:.1e} in the last"


def _given_the_same(
    model: Model, other: Model, ids: Ids, states: Sequence[Floats]
) -> Iterator[tuple[TensorDifference, Seen | None]]:
    """Every tensor in the order of execution: how far apart the models are there, and what they made of one input."""

    def matrix(role: str, a: Matrix, b: Matrix, y: Floats, other_y: Floats) -> tuple[TensorDifference, Seen]:
        dtypes = (a.dtype.name, b.dtype.name)
        output = relative(y, other_y)
        difference = TensorDifference(a.name, dtypes, output, weights_error(a, b), explained(a.dtype, b.dtype))
        return difference, Seen(role, a, b, y, other_y)

    def vector(name: str, a: Floats, b: Floats) -> tuple[TensorDifference, None]:
        apart = relative(a, b)
        return TensorDifference(name, (), apart, apart, EXACT), None

    def product(matrix: Matrix, x: Floats) -> Floats:
        return matmul(matrix, x, float32=True)  # with x as it is, so that only the weights make a difference

    a, b = model.tok_embeddings, other.tok_embeddings
    yield matrix("tok_embeddings", a, b, a.pick(ids), b.pick(ids))
    for n in range(other.hparams.n_layers):
        layer, other_layer = model.layers[n], other.layers[n]
        inputs = _inputs(other_layer, states[n], states[n + 1], other.hparams)
        for role, name in ROLES.items():
            a, b = getattr(layer, role), getattr(other_layer, role)
            if role in inputs:
                yield matrix(role, a, b, product(a, inputs[role]), product(b, inputs[role]))
            else:
                yield vector(f"blk.{n}.{name}", a, b)
    yield vector("output_norm.weight", model.norm, other.norm)
    if (model.output, other.output) != (model.tok_embeddings, other.tok_embeddings):
        x = rms_norm(states[-1][-LOGITS:], other.norm, other.hparams.norm_eps)  # (LOGITS, dim)
        yield matrix("output", model.output, other.output, product(model.output, x), product(other.output, x))


def _inputs(layer: Layer, before: Floats, after: Floats, h: Hyperparameters) -> dict[str, Floats]:
    """What each matrix of a layer is given: of the kind that it gets in the model, and the same for both models.

    before, after: the residual stream (n_tokens, dim) around the layer. For wo it is what every token would find if it
    looked at itself alone, for w1 and w3 the stream after the layer, where the model has that between its two halves.
    """
    x = rms_norm(before, layer.attention_norm, h.norm_eps)  # (n_tokens, dim)
    v = matmul(layer.wv, x).reshape(len(x), h.n_kv_heads, h.head_dim)  # (n_tokens, n_kv_heads, head_dim)
    found = np.repeat(v, h.n_heads // h.n_kv_heads, axis=1).reshape(len(x), -1)  # (n_tokens, n_heads * head_dim)
    y = rms_norm(after, layer.ffn_norm, h.norm_eps)  # (n_tokens, dim)
    gated = silu_times(matmul(layer.w1, y), matmul(layer.w3, y))  # (n_tokens, hidden_dim)
    return {"wq": x, "wk": x, "wv": x, "wo": found, "w1": y, "w3": y, "w2": gated}


def _of_weights(tensors: Sequence[TensorDifference], explained: set[str]) -> Iterator[Cause]:
    """The tensors whose weights are further from the other's than those of their like, and not explained yet."""
    like = defaultdict(list)
    for tensor in tensors:
        if tensor.weights:  # where nothing was rounded, as in a copy, there is nothing to compare with
            like[tensor.dtypes].append(tensor.weights)
    for tensor in tensors:
        peers = like[tensor.dtypes]
        usual = float(np.median(peers)) if len(peers) >= PEERS else tensor.explained / BAD
        if tensor.name not in explained and (tensor.differs or tensor.weights > max(BAD * usual, EXACT)):
            yield of_weights(tensor.name, tensor.dtypes, tensor.weights, usual)


def _gathered(causes: Sequence[Cause]) -> tuple[Cause, ...]:
    """Causes of one wording as one cause."""
    tensors: dict[tuple[str, str], tuple[str, ...]] = {}
    for cause in causes:
        key = (cause.code, cause.what)
        tensors[key] = tensors.get(key, ()) + cause.tensors
    return tuple(Cause(code, what, names) for (code, what), names in tensors.items())


def spelled(names: Sequence[str]) -> str:
    """Tensors' names, those of one kind in neighbouring layers together: "attn_q and attn_k of layers 0 to 31"."""
    layers: dict[str, list[int]] = {}
    alone = []
    for name in names:
        prefix, n, kind = [*name.removesuffix(".weight").split(".", 2), "", ""][:3]
        if prefix == "blk":
            layers.setdefault(kind, []).append(int(n))
        else:
            alone.append(prefix)
    kinds: dict[str, list[str]] = {}
    for kind, ns in layers.items():
        kinds.setdefault(_ranges(ns), []).append(kind)
    return "; ".join([*alone, *(f"{' and '.join(kind)} of {where}" for where, kind in kinds.items())])


def _ranges(ns: Sequence[int]) -> str:
    """layer 3; layers 0 to 2, 5"""
    starts = [n for n in ns if n - 1 not in ns]
    ends = [n for n in ns if n + 1 not in ns]
    ranges = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))
    return f"layer{'s' if len(ns) > 1 else ''} {ranges}"
