"""Generating: a prompt's ids in, one id after the other out, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llamatools.dtypes import Floats
from llamatools.errors import UsageError

from . import guard
from .cache import Cache
from .model import Model, forward
from .sampling import Sampler
from .weights import Ids

BATCH = 512  # tokens of a prompt computed at once

Decode = Callable[[Sequence[int]], str]
Ending = Literal["end of text", "token limit", "context full", "interrupted"]


@dataclass
class Timing:
    """Seconds and tokens of reading the prompt, and of generating. ending: why it stopped."""

    n_prompt: int = 0
    prompt_seconds: float = 0.0
    n_generated: int = 0
    generate_seconds: float = 0.0
    ending: Ending = "token limit"

    @property
    def prompt_rate(self) -> float:
        """Tokens per second."""
        return self.n_prompt / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generate_rate(self) -> float:
        """Tokens per second, after the first token, which the prompt's last logits give."""
        return (self.n_generated - 1) / self.generate_seconds if self.generate_seconds else 0.0


def generate(
    model: Model,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int,
    end_ids: Collection[int] = (),
    timing: Timing | None = None,
    cache: Cache | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yields the ids that follow `prompt`, up to max_tokens, to an end id (not yielded) or to the end of the context.

    timing: is filled in on the way. cache: what comes before the prompt; its capacity is the context then.
    stopped: is asked before each computation whether there should be no more of them.
    Raises UsageError for an empty prompt and for one longer than the context, and FormatError when the model's file
    changed meanwhile.
    """
    timing = timing or Timing()
    context = model.hparams.max_seq_len if cache is None else cache.capacity
    check_prompt(prompt, context)
    if max_tokens < 0:
        raise UsageError(f"at most {max_tokens} tokens were asked for: it must be 0 or more")

    cache = cache or Cache.of(model.hparams, len(prompt) + max_tokens, float32=model.float32)
    timing.ending = "interrupted"
    started = time.perf_counter()
    logits = read_prompt(model, np.array(prompt, np.int64), cache, stopped)
    if logits is None:
        return
    guard.check()
    timing.n_prompt, timing.prompt_seconds = len(prompt), time.perf_counter() - started

    started = time.perf_counter()
    for n in range(max_tokens):
        drawn = sampler(logits[-1])
        if drawn in end_ids:
            timing.ending = "end of text"
            return
        timing.n_generated, timing.generate_seconds = n + 1, time.perf_counter() - started
        yield drawn
        if cache.n_past == context:
            timing.ending = "context full"
            return
        if stopped():
            return
        if n + 1 < max_tokens:
            logits = forward(model, np.array([drawn]), cache)
            guard.check()
    timing.ending = "token limit"


def check_prompt(prompt: Sequence[int], context: int) -> None:
    """Raises UsageError for an empty prompt and for one longer than the context."""
    if not len(prompt):
        raise UsageError("an empty prompt", todo="This model's tokenizer begins no text by itself; give it some")
    if len(prompt) > context:
        raise UsageError(f"a prompt of {len(prompt)} tokens, but the model's context is {context}")


def read_prompt(model: Model, prompt: Ids, cache: Cache, stopped: Callable[[], bool]) -> Floats | None:
    """The logits (1, vocab_size) after the last token of `prompt`, computed by the batch; None if stopped before."""
    for start in range(0, len(prompt), BATCH):
        if stopped():
            return None
        logits = forward(model, prompt[start : start + BATCH], cache, last_only=True)
    return logits


class TextStream:
    """Turns a stream of ids into a stream of text.

    One id may be part of a character, and how the first one is written may depend on what stands before it (a leading
    space). So each step decodes the ids since the last but one, and shows what is new.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt)
        self._anchor = 0  # decoding begins here
        self._shown = len(self._ids)  # the text of the ids before is already out

    def push(self, token: int) -> str:
        """The text that this id completes, which may be none."""
        self._ids.append(token)
        new = self._new()
        if new.endswith("\N{REPLACEMENT CHARACTER}"):  # bytes of a character that is not whole yet
            return ""
        self._anchor, self._shown = self._shown, len(self._ids)
        return new

    def rest(self) -> str:
        """What is left when no more ids come."""
        return self._new()

    def _new(self) -> str:
        before = self._decode(self._ids[self._anchor : self._shown])
        return self._decode(self._ids[self._anchor :])[len(before) :]
