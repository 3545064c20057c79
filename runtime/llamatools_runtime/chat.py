"""A conversation with a model: what was said so far as tokens, and their keys and values, each computed once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from llamatools.checkpoint import CONTROL, Tokenizer
from llamatools.errors import UnsupportedError, UsageError, in_file
from llamatools.metadata import Kind

from .cache import Cache
from .chat_formats import ChatFormat, Items, format_named, recognise
from .generation import TextStream, Timing, generate
from .load import load
from .model import Model
from .sampling import Sampler
from .text import TextCodec


class TurnCodec:
    """Encodes turns in a format.

    end_ids: the ids that end a reply. Raises as `TextCodec`.
    """

    def __init__(self, tokenizer: Tokenizer, chat_format: ChatFormat, system: str | None = None) -> None:
        """system: instructions for the whole conversation, which go with the first turn."""
        ids = {text: id_ for id_, text in enumerate(tokenizer.tokens)}
        self._marks = {mark: ids[mark] for mark in chat_format.marks}
        types = tokenizer.types.copy()
        types[list(self._marks.values())] = CONTROL  # whatever the file says, so that no text is ever cut into them
        self._codec = TextCodec(replace(tokenizer, types=types))
        self._format, self._system = chat_format, system
        self.end_ids = {*self._codec.end_ids, self._marks[chat_format.end[0]]}
        self.decode = self._codec.decode

    def first(self, text: str) -> list[int]:
        """The ids of a conversation's first turn, up to where the reply begins."""
        f = self._format
        return self._encode((*f.start, *(f.turn if self._system is None else f.with_system)), text)

    def later(self, text: str) -> list[int]:
        """The ids of a turn that comes after the end of a reply."""
        return self._encode(self._format.turn, text)

    def end(self) -> list[int]:
        """The ids that come after a reply."""
        return self._encode(self._format.end)

    def _encode(self, items: Items, text: str = "") -> list[int]:
        """The ids of a row of the format. Only its own items become marks, not the user's words."""
        said = {"text": text.strip() if self._format.trims else text, "system": (self._system or "").strip()}
        ids: list[int] = []
        for item in items:
            if item in self._marks:
                ids.append(self._marks[item])
            else:
                filled = re.sub(r"\{(text|system)\}", lambda slot: said[slot[1]], item)
                ids += self._codec.encode(filled, add_bos=False, add_eos=False)
        return ids


class Chat:
    """A conversation of a user and a model.

    ids: the tokens so far. Those that the cache does not hold yet are computed with the next turn.
    timing: of the last reply.
    """

    def __init__(self, model: Model, turns: TurnCodec, sampler: Sampler, *, n_tokens: int | None = None) -> None:
        """n_tokens: that it may have; the model's context by default. Raises as `Cache.of`."""
        self._model, self._turns, self._sampler = model, turns, sampler
        self._cache = Cache.of(model.hparams, n_tokens, float32=model.float32)
        self.ids: list[int] = []
        self.timing = Timing()

    @property
    def capacity(self) -> int:
        """How many tokens the conversation can have."""
        return self._cache.capacity

    def forget(self) -> None:
        """Begins anew, with the same instructions."""
        self._rewind(0)

    def say(
        self, text: str, *, max_tokens: int | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[str]:
        """Yields the reply to `text` piece by piece. Why it ended is in `timing`.

        stopped: is asked before each token; if it says yes, the reply ends as far as it has come, or if there is none
        yet, it is as if nothing had been said. Raises UsageError where the context has no room for `text`, which then
        counts as not said either, and as `generate`.
        """
        before = len(self.ids)
        self.timing = Timing()
        self.ids += self._turns.later(text) if self.ids else self._turns.first(text)
        new = self.ids[self._cache.n_past :]
        room = self.capacity - self._cache.n_past
        if len(new) > room:
            del self.ids[before:]
            raise UsageError(
                f"the context is full: it holds {self.capacity} tokens, {before} are taken and this needs "
                f"{len(new) - (before - self._cache.n_past)} more"
            )
        limit = self.capacity if max_tokens is None else max_tokens
        reply = TextStream(self._turns.decode, self.ids)
        tokens = generate(
            self._model,
            new,
            self._sampler,
            max_tokens=limit,
            end_ids=self._turns.end_ids,
            timing=self.timing,
            cache=self._cache,
            stopped=stopped,
        )
        shown = False
        for token in tokens:
            self.ids.append(token)
            piece = reply.push(token)
            piece = piece if shown else piece.lstrip()  # the space that a format or a vocabulary puts before a reply
            shown = shown or bool(piece)
            if piece:
                yield piece
        yield reply.rest()
        if self.timing.n_generated == 0 and self.timing.ending == "interrupted":
            self._rewind(before)
        else:
            self.ids += self._turns.end()

    def _rewind(self, n_tokens: int) -> None:
        del self.ids[n_tokens:]
        self._cache.n_past = min(self._cache.n_past, n_tokens)


def open_chat(
    path: Path | str,
    sampler: Sampler,
    *,
    format_name: str | None = None,
    system: str | None = None,
    n_tokens: int | None = None,
) -> tuple[Chat, str]:
    """A conversation with the model in a GGUF file, and its format and by what that was chosen, as a clause.

    Raises as `load`, `Chat`, `format_named` and `recognise`; UnsupportedError for a file without a vocabulary.
    """
    model, layout = load(path)
    tokenizer = layout.tokenizer
    if tokenizer is None:
        raise UnsupportedError("it has no vocabulary to talk with", file=path)
    with in_file(path):
        if format_name is None:
            name = layout.metadata.get("general.name")
            chat_format, sign = recognise(tokenizer, name.data if name and name.kind is Kind.STRING else "")
        else:
            chat_format, sign = format_named(format_name, tokenizer), "--chat-format"
        turns = TurnCodec(tokenizer, chat_format, system)
        return Chat(model, turns, sampler, n_tokens=n_tokens), f"{chat_format.name}, by {sign}"
