"""Proof that a converted file computes what the original computes: the same tokens through both, layer by layer.

The original goes through oracle.py (torch, Meta's formulas), the file through model.py. The two advance in step, so
that of neither more than one layer's hidden states are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llamatools.checkpoint import Checkpoint, Hyperparameters
from llamatools.dtypes import Floats
from llamatools.errors import UsageError, in_file
from llamatools.layout import Layout
from llamatools.names import gguf_to_meta

from . import guard
from .cache import Cache
from .fidelity import StoredTensor, stored_tensors
from .generation import check_prompt
from .load import load
from .model import Model, forward, frequencies
from .scoring import divergence
from .tolerance import Tolerance, tolerance_for

if TYPE_CHECKING:
    from .oracle import Oracle

PASSAGE_TOKENS = 512  # of the built-in passage, at most
FREQUENCY_TOLERANCE = 1e-5  # relative; float32 powers differ by 1e-7

# Where vocabularies are read wrongly it shows in digits, spaces, line ends, accents, other scripts and emoji first.
TOKENIZER_PROBE = "Zoë paid 1234567 ₽ (or 89.10 €) for  東京's\n\n\tllama 🦙🏽,\r\n   didn't   SHE?  "

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Comparison:
    """What was found. Differences are the file's from the original's, over n_tokens positions.

    scale: root mean square of the original's logits. difference: largest of any logit; relative_difference: of scale.
    mean_divergence, max_divergence: KL of the original's next-token probabilities from the file's, in nats.
    top1: share of positions where both find the same token likeliest.
    state_differences: per layer, root mean square over tokens of the relative difference of hidden states.
    parted_at: the first layer where that is beyond the tolerance, None where none is.
    unfaithful: the tensors whose weights are further from the original's than their dtype's rounding explains.
    n_tensors: how many were compared. constants: hyperparameters that differ, each as a sentence.
    tokenizers: how the tokenizers differ, None where they agree or there is only one (tokenizers_compared).
    """

    n_tokens: int
    tolerance: Tolerance
    scale: float
    difference: float
    relative_difference: float
    mean_divergence: float
    max_divergence: float
    top1: float
    state_differences: tuple[float, ...]
    parted_at: int | None
    n_tensors: int
    unfaithful: tuple[StoredTensor, ...]
    constants: tuple[str, ...]
    tokenizers_compared: bool
    tokenizers: str | None

    @property
    def passed(self) -> bool:
        """Whether what comes out is within the tolerance for the file's dtypes; hidden states only tell where not."""
        limit = self.tolerance
        return (
            (limit.logits is None or self.relative_difference <= limit.logits)
            and (limit.divergence is None or self.mean_divergence <= limit.divergence)
            and not self.unfaithful
            and not self.constants
            and self.tokenizers is None
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = without_infinities(asdict(self) | {"passed": self.passed})
        return found

    def lines(self) -> list[str]:
        """For people, within 80 columns."""
        n_layers, same = len(self.state_differences), round(self.top1 * self.n_tokens)
        parted = (
            f"agree through all {n_layers} layers, within {max(self.state_differences):.1e}"
            if self.parted_at is None
            else f"part in layer {self.parted_at} of {n_layers}, by {self.state_differences[self.parted_at]:.1e}"
        )
        tensors = f"all {self.n_tensors} hold the original's weights{', rounded' if self.tolerance.dtype else ''}"
        if self.unfaithful:
            worst = max(self.unfaithful, key=lambda tensor: tensor.error)
            tensors = f"{len(self.unfaithful)} of {self.n_tensors} differ, most {worst.name} ({worst.error:.1e})"
        tokenizers = self.tokenizers or ("agree" if self.tokenizers_compared else "not compared: there is only one")
        return [
            f"{'PASSED' if self.passed else 'FAILED'}: {self.n_tokens} tokens against the original",
            f"  tolerance       {self.tolerance}",
            f"  logits          differ by {self.difference:.1e} at most, {self.relative_difference:.1e} of their scale",
            f"  divergence      {self.mean_divergence:.1e} nats on average, {self.max_divergence:.1e} at most",
            f"  likeliest token the same at {same} of {self.n_tokens} positions",
            f"  hidden states   {parted}",
            f"  tokenizers      {tokenizers}",
            f"  tensors         {tensors}",
            *(f"  hyperparameter  {constant}" for constant in self.constants),
        ]


def compare(
    path: Path | str,
    checkpoint: Checkpoint,
    *,
    prompt: str | None = None,
    ids: Sequence[int] | None = None,
    tokenizer: Path | None = None,
) -> Comparison:
    """Compares a GGUF file with the Meta checkpoint it was made from.

    The tokens are `ids`, or `prompt` as the original's tokenizer cuts it, or the first 512 of a built-in passage.
    tokenizer: the original tokenizer.model, by default the one in or above the checkpoint's folder.
    Memory: one layer of the original in float32, the logits of all tokens twice, and n_heads * n_tokens ** 2 scores.
    Raises UsageError when the two are not of one shape, or the prompt is longer than the context; UnsupportedError
    without torch; FormatError as `load`, and where the file computes something that is not finite.
    """
    from .oracle import Oracle

    oracle = Oracle(checkpoint)
    model, layout = load(path, float32=True)
    with in_file(path):
        _check_same_shape(model.hparams, oracle.hparams)
        encoders = _encoders(layout, checkpoint, tokenizer)
        ids = _choose_ids(prompt, encoders, model.hparams.max_seq_len) if ids is None else ids
        check_prompt(ids, model.hparams.max_seq_len)
        tolerance = tolerance_for(
            (tensor.dtype, checkpoint.tensors[name].dtype)
            for tensor in layout.tensors
            if (name := gguf_to_meta(tensor.name)) is not None and name in checkpoint.tensors
        )
        stored = list(stored_tensors(layout, checkpoint))
        logits, expected, states = _both(model, oracle, ids)
    difference, scale = float(np.abs(logits - expected).max()), float(np.sqrt(np.mean(np.square(expected))))
    divergences = divergence(expected, logits)
    return Comparison(
        n_tokens=len(ids),
        tolerance=tolerance,
        scale=scale,
        difference=difference,
        relative_difference=float(_relative(difference, scale)),
        mean_divergence=float(divergences.mean()),
        max_divergence=float(divergences.max()),
        top1=float((logits.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        state_differences=tuple(states),
        parted_at=next((n for n, relative in enumerate(states) if not relative <= tolerance.states), None),
        n_tensors=len(stored),
        unfaithful=tuple(tensor for tensor in stored if not tensor.faithful),
        constants=tuple(_differing_constants(model, oracle)),
        tokenizers_compared=len(encoders) == 2,
        tokenizers=_first_disagreement(encoders, prompt),
    )


def _both(model: Model, oracle: Oracle, ids: Sequence[int]) -> tuple[Floats, Floats, list[float]]:
    """Logits of the file and of the original (n_tokens, vocab_size), and how far apart the hidden states were."""
    original = oracle.hidden_states(ids)
    hidden: list[Floats] = []  # the original's, of the last layer seen
    differences: list[float] = []

    def on_layer(n: int, x: Floats) -> None:
        hidden[:] = [next(original)]  # (n_tokens, dim)
        apart = _relative(np.linalg.norm(x - hidden[0], axis=1), np.linalg.norm(hidden[0], axis=1))  # (n_tokens,)
        differences.append(float(np.sqrt(np.mean(np.square(apart)))))

    logits = forward(model, np.array(ids, np.int64), Cache.of(model.hparams, len(ids), float32=True), on_layer=on_layer)
    guard.check()
    return logits, oracle.logits(hidden[0]), differences


def _relative(difference: ArrayLike, scale: ArrayLike) -> NDArray[np.float64]:
    """difference / scale, where nothing differs 0 whatever the scale."""
    difference, scale = np.asarray(difference, np.float64), np.asarray(scale, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / scale)


def without_infinities(value: Any) -> Any:
    """`value` for JSON, which has no infinity: null where there was no scale to relate to."""
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_same_shape(ours: Hyperparameters, original: Hyperparameters) -> None:
    for field in ("n_layers", "dim", "vocab_size"):
        a, b = getattr(ours, field), getattr(original, field)
        if a != b:
            raise UsageError(f"{field} is {a}, in the checkpoint {b}", todo="These are two different models")


def _differing_constants(model: Model, oracle: Oracle) -> Iterator[str]:
    """Numbers that enter the formulas, compared themselves: a text may be too short for the logits to tell."""
    ours, original = np.float32(model.hparams.norm_eps), np.float32(oracle.hparams.norm_eps)
    if ours != original:
        yield f"norm_eps is {ours:.3g}, in the original {original:.3g}"
    ours_by_pair, original_by_pair = frequencies(model.hparams.rope_theta, model.rope_divisors), oracle.frequencies()
    apart = np.abs(ours_by_pair / original_by_pair - 1)  # (head_dim / 2,)
    if not (apart <= FREQUENCY_TOLERANCE).all():
        pair = int(apart.argmax())
        yield f"rotary pair {pair} turns {ours_by_pair[pair]:.4g} a token, not {original_by_pair[pair]:.4g}"


def _encoders(layout: Layout, checkpoint: Checkpoint, tokenizer: Path | None) -> list[Encode]:
    """How the original and the file encode a text, in this order, as far as they have a tokenizer."""
    from llamatools.formats.meta import find_tokenizer

    from .oracle_text import original_encoder
    from .text import TextCodec

    path = tokenizer or find_tokenizer(checkpoint.path)
    encoders: list[Encode] = [original_encoder(path)] if path else []
    if layout.tokenizer is not None:
        encoders.append(TextCodec(layout.tokenizer).encode)
    return encoders


def _choose_ids(prompt: str | None, encoders: list[Encode], context: int) -> Sequence[int]:
    if not encoders:
        raise UsageError("neither the file nor the checkpoint has a tokenizer to cut a text into tokens")
    return encoders[0](passage())[: min(PASSAGE_TOKENS, context)] if prompt is None else encoders[0](prompt)


def passage() -> str:
    """The built-in text: the opening of Lewis Carroll's Alice's Adventures in Wonderland (1865), public domain."""
    return (files(__package__) / "passage.txt").read_text(encoding="utf-8")


def _first_disagreement(encoders: list[Encode], prompt: str | None) -> str | None:
    if len(encoders) < 2:
        return None
    for text in (passage() if prompt is None else prompt, TOKENIZER_PROBE):
        original, ours = (list(encode(text)) for encode in encoders)
        if original != ours:
            both = zip(original, ours, strict=False)
            at = next((n for n, (a, b) in enumerate(both) if a != b), min(len(original), len(ours)))
            here = [str(ids[at]) if at < len(ids) else "none" for ids in (ours, original)]
            return f"differ at token {at} of {len(original)}: {here[0]}, in the original {here[1]}"
    return None
