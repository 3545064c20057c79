"""`llamatools run`: a GGUF file and a prompt in, text out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamatools.errors import UnsupportedError, in_file

from .generation import TextStream, Timing, generate
from .kernels.team import team
from .load import load
from .sampling import Sampler
from .text import TextCodec


@dataclass(frozen=True)
class RunReport:
    """text: what was generated, which reads on from the prompt. ids: its tokens."""

    text: str
    ids: tuple[int, ...]
    timing: Timing

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"text": self.text, "ids": list(self.ids), **asdict(self.timing)}

    def lines(self) -> list[str]:
        """For people, within 80 columns."""
        t = self.timing
        return [
            f"prompt:    {t.n_prompt} tokens, {t.prompt_rate:.1f} a second",
            f"generated: {t.n_generated} tokens, {t.generate_rate:.1f} a second ({t.ending})",
        ]


def run(
    path: Path | str,
    prompt: str = "",
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    float32: bool = False,
    threads: int | None = None,
    on_text: Callable[[str], None] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> RunReport:
    """Lets the model in a GGUF file read `prompt` and write on, by default always with the likeliest token.

    It stops at a token that ends the text or a turn, or begins a text, after max_tokens, or at the end of the context.
    float32: as of `load`. threads: as many as processors by default; never changes the text.
    on_text: is given each piece of text as soon as it is there. on_token: is told how many tokens there are, 0 when the
    model is mapped.
    Raises as `load`, `Sampler` and `generate`; UnsupportedError for a file without a vocabulary.
    """
    sampler = Sampler(temperature, top_k, top_p, seed)
    team(threads)
    model, layout = load(path, float32=float32)
    if on_token is not None:
        on_token(0)
    if layout.tokenizer is None:
        raise UnsupportedError("it has no vocabulary to read a prompt with", file=path)
    with in_file(path):
        codec = TextCodec(layout.tokenizer)
        ids, timing = codec.encode(prompt), Timing()
    # A model that was trained on texts one after the other says that its text is over by beginning the next.
    ends = {*codec.end_ids, *(i for role, i in layout.tokenizer.special.items() if role == "bos")}

    def tokens() -> Iterator[int]:
        with in_file(path):  # not around on_text, whose errors are not the file's
            yield from generate(model, ids, sampler, max_tokens=max_tokens, end_ids=ends, timing=timing)

    stream = TextStream(codec.decode, ids)
    new_ids: list[int] = []
    pieces: list[str] = []

    def show(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

    for token in tokens():
        new_ids.append(token)
        if on_token is not None:
            on_token(len(new_ids))
        show(stream.push(token))
    show(stream.rest())
    return RunReport("".join(pieces), tuple(new_ids), timing)
