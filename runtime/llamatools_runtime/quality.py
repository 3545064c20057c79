"""`llamatools run --perplexity`: how well a model foretells a text, and how far it is from another model.

As llama-perplexity does it (llama.cpp, tools/perplexity/perplexity.cpp), so that the figures can be compared:

- The text is cut into tokens once, without one line end that may close the file, and the tokens into chunks of
  `context`. What is left at the end is not used.
- Each chunk is read from an empty cache. Where the vocabulary begins texts with BOS, it takes the chunk's first place.
- The first half of a chunk is only read; of the second, each token but its first is scored by the logits before it. So
  every token that counts has at least half a context before it.

Two models read the same chunk side by side, a batch of tokens at a time. llama-perplexity instead writes the first
model's probabilities to a file (11 GiB for Llama 2, 37 GiB for Llama 3 on WikiText-2) and reads it for the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llamatools.checkpoint import Checkpoint, Tokenizer
from llamatools.dtypes import Floats
from llamatools.errors import FormatError, UnsupportedError, UsageError, in_file
from llamatools.layout import Layout

from . import guard
from .cache import Cache
from .generation import BATCH
from .load import load
from .model import Model, forward
from .planned import model_of_checkpoint
from .scoring import Estimate, Numbers, Scores, exponential, mean, quantile, root_mean_square, score, surprise
from .text import TextCodec
from .weights import Ids

CONTEXT = 512

OnChunk = Callable[[int, int, "Quality"], None]


@dataclass(frozen=True)
class Quality:
    """What was measured. The properties are estimates from the tokens that were scored, each with its standard error.

    context: tokens of a chunk. n_chunks: how many there were. surprise: of each scored token, in nats (n_tokens,).
    scores: the same tokens beside the other model's, None where there is none.
    """

    context: int
    n_chunks: int
    surprise: Numbers
    scores: Scores | None = None

    @property
    def perplexity(self) -> Estimate:
        """e to the power of the mean surprise: among how many equally likely tokens the model was left to choose."""
        return exponential(mean(self.surprise))

    @property
    def running_perplexity(self) -> list[Estimate]:
        """The perplexity of the chunks up to each."""
        return running(self.surprise, self.n_chunks)

    def against(self) -> dict[str, Estimate]:
        """What sets the model apart from the other, by name; nothing where there is no other."""
        s = self.scores
        if s is None:
            return {}
        return {
            "base_perplexity": exponential(mean(s.base_surprise)),
            "log_ratio": mean(s.surprise - s.base_surprise),  # paired, so that what is hard for both cancels
            "mean_divergence": mean(s.divergence),
            "median_divergence": quantile(s.divergence, 0.5),
            "percentile99_divergence": quantile(s.divergence, 0.99),
            "same_top": mean(s.same_top),
            "rms_change": root_mean_square(s.change),
            "mean_change": mean(s.change),
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {"perplexity": self.perplexity, **self.against()}
        facts: dict[str, Any] = {"context": self.context, "chunks": self.n_chunks, "tokens": len(self.surprise)}
        facts |= {name: asdict(estimate) for name, estimate in found.items()}
        facts["running_perplexity"] = [asdict(estimate) for estimate in self.running_perplexity]
        if self.scores is not None:
            facts["max_divergence"] = float(self.scores.divergence.max())
        return facts

    def lines(self) -> list[str]:
        """For people, within 80 columns."""
        n = f"{len(self.surprise):,} tokens of {self.n_chunks} chunks of {self.context}"
        lines = [f"perplexity       {self.perplexity:.4f}   {n}"]
        if self.scores is None:
            return lines
        a = self.against()
        return [
            *lines,
            f"of the other     {a['base_perplexity']:.4f}   ln of the ratio {a['log_ratio']:.5f}",
            f"KL divergence    {a['mean_divergence']:.6f} nats a token, on average",
            f"                 {a['percentile99_divergence']:.6f} at 99 %, {self.scores.divergence.max():.6f} at most",
            f"likeliest token  {a['same_top'].scaled(100):.3f} % the same",
            f"probability      {a['rms_change'].scaled(100):.3f} % changed, root mean square",
        ]


def measure(
    path: Path | str,
    text: Path | str,
    *,
    context: int = CONTEXT,
    chunks: int | None = None,
    against: Checkpoint | None = None,
    float32: bool = False,
    on_chunk: OnChunk | None = None,
) -> Quality:
    """The perplexity of the GGUF file `path` on the text in the file `text`, and its distance from another model.

    context: tokens of a chunk. chunks: how many are read, by default all. against: a GGUF or a Meta checkpoint with
    the same vocabulary. float32: as of `load`, for both. on_chunk(n, n_chunks, quality): is told after each chunk, of
    all up to it.
    Memory: keys and values of `context` tokens and the logits of 256, for each model; five numbers a token.
    Raises as `load`; UsageError for a text that is too short, a context the model has not, another vocabulary.
    """
    model, layout = load(path, float32=float32)
    readers = [_Reader(Path(path), model)]
    ids = _tokens(Path(text), path, layout)
    if against is not None:
        other, other_layout = model_of_checkpoint(against, float32=float32)
        readers.append(_Reader(against.path, other))
        _check_same_size(readers[0], readers[1])
        _check_same_tokens(readers[0], readers[1], ids, _tokens(Path(text), against.path, other_layout))
    for reader in readers:
        reader.check(context)
    windows = _windows(ids, layout.tokenizer, context, chunks, Path(text))

    surprises: list[Numbers] = []
    scores: list[Scores] = []
    for n, window in enumerate(windows, 1):
        for logits, tokens in _read(window, readers):
            if against is None:
                surprises.append(surprise(logits[0], tokens))
            else:
                scores.append(score(logits[1], logits[0], tokens))
                surprises.append(scores[-1].surprise)
        quality = Quality(context, n, np.concatenate(surprises), Scores.joined(scores) if scores else None)
        if on_chunk is not None:
            on_chunk(n, len(windows), quality)
    return quality


def running(values: Numbers, n_chunks: int) -> list[Estimate]:
    """The perplexity that `values`, the surprises of equal chunks, give for the chunks up to each."""
    per_chunk = len(values) // n_chunks
    return [exponential(mean(values[: n * per_chunk])) for n in range(1, n_chunks + 1)]


@dataclass
class _Reader:
    """A model that reads a chunk a batch at a time; its errors carry its path."""

    path: Path
    model: Model
    cache: Cache | None = None

    def check(self, context: int) -> None:
        has = self.model.hparams.max_seq_len
        if context > has:
            raise UsageError(f"chunks of {context} tokens, but the model's context is {has}", file=self.path)

    def begin(self, n_tokens: int) -> None:
        with in_file(self.path):
            self.cache = Cache.of(self.model.hparams, n_tokens, float32=self.model.float32)

    def read(self, ids: Ids, *, last_only: bool = False) -> Floats:
        assert self.cache is not None, "begin comes first"
        with in_file(self.path):
            logits = forward(self.model, ids, self.cache, last_only=last_only)
        guard.check()
        return logits


def _read(window: Ids, readers: Sequence[_Reader]) -> Iterator[tuple[list[Floats], Ids]]:
    """Each reader's logits before the tokens of a chunk that are scored, and these tokens, a batch at a time."""
    first, last = len(window) // 2, len(window) - 1  # the last token is foretold, and never read
    for reader in readers:
        reader.begin(last)
        for start in range(0, first, BATCH):
            reader.read(window[start : min(start + BATCH, first)], last_only=True)
    for start in range(first, last, BATCH):
        stop = min(start + BATCH, last)
        yield [reader.read(window[start:stop]) for reader in readers], window[start + 1 : stop + 1]


def _tokens(text: Path, path: Path | str, layout: Layout) -> Ids:
    """The file's text as the vocabulary of the model at `path` cuts it, with BOS where that begins texts with it."""
    with in_file(text):
        content = text.read_bytes().removesuffix(b"\n")
        try:
            decoded = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"not UTF-8 text from byte {error.start} on") from error
    with in_file(path):
        if layout.tokenizer is None:
            raise UnsupportedError("it has no vocabulary to read a text with")
        return np.array(TextCodec(replace(layout.tokenizer, add_eos=False)).encode(decoded), np.int64)


def _check_same_size(reader: _Reader, other: _Reader) -> None:
    size, other_size = reader.model.hparams.vocab_size, other.model.hparams.vocab_size
    if size != other_size:
        raise UsageError(
            f"a vocabulary of {size} tokens, but {other_size} in {other.path}", file=reader.path,
            todo="Probabilities can be compared over one vocabulary only",
        )  # fmt: skip


def _check_same_tokens(reader: _Reader, other: _Reader, ids: Ids, other_ids: Ids) -> None:
    if not np.array_equal(ids, other_ids):
        n = min(len(ids), len(other_ids))
        differ = np.flatnonzero(ids[:n] != other_ids[:n])
        raise UsageError(
            f"it cuts the text differently from {other.path}, from token {differ[0] if differ.size else n} on",
            file=reader.path, todo="Probabilities can be compared after the same tokens only",
        )  # fmt: skip


def _windows(ids: Ids, tokenizer: Tokenizer | None, context: int, chunks: int | None, text: Path) -> list[Ids]:
    """The chunks, each with BOS first where the vocabulary has it so."""
    if context < 4:
        raise UsageError(f"chunks of {context} tokens: of fewer than 4 too little is scored", where="--context")
    if chunks is not None and chunks < 1:
        raise UsageError(f"{chunks} chunks: at least 1 is needed", where="--chunks")
    if len(ids) < 2 * context:
        raise UsageError(
            f"{len(ids)} tokens, but chunks of {context} need at least two, {2 * context} tokens", file=text,
            todo="Choose a longer text or a smaller --context",
        )  # fmt: skip
    n_chunks = min(len(ids) // context, chunks or len(ids))
    windows = np.array(ids[: n_chunks * context]).reshape(n_chunks, context)
    if tokenizer is not None and tokenizer.add_bos and "bos" in tokenizer.special:
        windows[:, 0] = tokenizer.special["bos"]
    return list(windows)
