"""`llamatools run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import EXIT_FINDINGS, FormatError, UsageError, in_file
from .chat import converse
from .options import Json, Threads, meta_options
from .printing import Bar, print_json, print_report, print_text

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..formats.meta import MetaOptions

STDIN = Path("-")


def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The GGUF file to run.")],
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its text, less a last line's end, is the prompt; - is stdin.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk with the model, in the format it was trained on.")] = False,
    chat_format: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of --chat, where the file does not tell the format.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Of --chat: instructions to the model.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to write at most. [default: 256; of a chat, no limit]", min=0),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 1 samples as trained.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that make up this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 is all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling; the same seed gives the same text.")] = None,
    float32: Annotated[
        bool, typer.Option("--float32", help="Round nothing on the way to 8 bits, nor keys and values to float16.")
    ] = False,
    threads: Threads = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER",
            help="Compare with this Meta checkpoint, computed in float32 by torch. With --perplexity or --layers, "
            "with this Meta checkpoint or GGUF file.",
        ),
    ] = None,
    perplexity: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure how well the model foretells this text, as llama-perplexity does."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Of --perplexity: tokens of a chunk. [default: 512] Of --chat: tokens in all. [default: the model's]",
            min=1,
        ),
    ] = None,
    chunks: Annotated[int | None, typer.Option(help="Of --perplexity: how many are read; all by default.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Of --perplexity: write it as a page for a browser.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --html if it exists.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Of --against: tell in which layer and matrix the two part, and why.")
    ] = False,
    memory_report: Annotated[
        bool, typer.Option("--memory-report", help="Tell what running took of memory, time and the disk, and when.")
    ] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="The checkpoint's tokenizer.model, if elsewhere.")] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Of the checkpoint, as it was stated to convert.")] = None,
    rope_factor: Annotated[float | None, typer.Option(help="Of the checkpoint, likewise.")] = None,
    norm_eps: Annotated[float | None, typer.Option(help="Of the checkpoint, likewise.")] = None,
    as_json: Json = False,
) -> None:
    """Run a GGUF file from its mapping, or prove it right. --against compares it with what the original computes."""
    import llamatools_runtime as runtime
    from llamatools_runtime import guard

    guard.arm()
    if threads is not None:
        if threads < 1:
            raise UsageError(f"{threads} threads cannot do the work", where="--threads")
        from llamatools_runtime.kernels.team import team

        team(threads)
    if chat:
        others: dict[str, object] = {"--layers": layers, "--chunks": chunks, "--html": html, "--float32": float32}
        others |= {
            "--perplexity": perplexity,
            "--against": against,
            "--memory-report": memory_report,
            "--json": as_json,
        }
        _check_chat_options(others, prompt_file)
        sampler = runtime.Sampler(temperature, top_k, top_p, seed)
        first = _prompt(prompt, prompt_file) or ""
        converse(
            model,
            first,
            sampler,
            format_name=chat_format,
            system=system,
            n_tokens=context,
            max_tokens=max_tokens,
        )
        return
    for name, value in (("--chat-format", chat_format), ("--system", system)):
        if value is not None:
            raise UsageError("it is an option of --chat, which is not given", where=name)
    _check_run_options(
        perplexity,
        against,
        layers,
        of_perplexity={"--context": context, "--chunks": chunks, "--html": html},
        of_against={
            "--tokenizer": tokenizer,
            "--rope-theta": rope_theta,
            "--rope-factor": rope_factor,
            "--norm-eps": norm_eps,
        },
    )
    if memory_report and (perplexity is not None or against is not None):
        raise UsageError("it goes without --perplexity and --against", where="--memory-report")
    if float32 and against is not None and perplexity is None:
        raise UsageError("models are compared in float32 anyway", where="--float32")
    prompt = _prompt(prompt, prompt_file)
    options = None
    if against is not None:  # what it takes to read one is not imported for other runs
        options = meta_options(tokenizer, overrides=(None, rope_theta, rope_factor, norm_eps))
    if perplexity is not None:
        _measure(model, perplexity, against, options, context, chunks, float32, html, force, as_json)
        return
    if layers and against is not None:
        parting = runtime.part(model, _opened(against, options), prompt=prompt or None)
        print_report(parting, as_json)
        if not parting.same:
            raise typer.Exit(EXIT_FINDINGS)
        return
    if against is None:
        report = (runtime.report_memory if memory_report else runtime.run)(
            model,
            prompt or "",
            max_tokens=256 if max_tokens is None else max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            float32=float32,
            on_text=None if as_json else print_text,
        )
        if as_json:
            print_json(report.as_dict())
        else:
            print()
        if memory_report:
            assert isinstance(report, runtime.MemoryReport)
            if not as_json:
                print()
                for line in report.lines():
                    print(line)
            report = report.run
        for line in report.lines():
            print(line, file=sys.stderr)
        return
    comparison = runtime.compare(model, _opened(against, options), prompt=prompt or None, tokenizer=tokenizer)
    print_report(comparison, as_json)
    if not comparison.passed:
        raise typer.Exit(EXIT_FINDINGS)


def _check_chat_options(others: dict[str, object], prompt_file: Path | None) -> None:
    for name, value in others.items():
        if value:
            raise UsageError("it goes without --chat", where=name)
    if prompt_file == STDIN:
        raise UsageError("a conversation reads stdin itself", where="--prompt-file -", todo="Name a file")


def _prompt(prompt: str | None, path: Path | None) -> str | None:
    """What --prompt or --prompt-file says. A file's last end of line is left out, as in llama.cpp."""
    if path is None:
        return prompt
    if prompt is not None:
        raise UsageError("it goes without --prompt", where="--prompt-file")
    with in_file("stdin" if path == STDIN else path):
        try:
            data = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
            return data.decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise FormatError(f"not UTF-8 text from byte {error.start} on", todo="Name a text as the prompt") from error


def _check_run_options(
    perplexity: Path | None,
    against: Path | None,
    layers: bool,
    *,
    of_perplexity: dict[str, object],
    of_against: dict[str, object],
) -> None:
    for needed, is_given, options in (
        ("--perplexity", perplexity is not None, of_perplexity),
        ("--against", against is not None, of_against),
    ):
        without = [name for name, value in options.items() if value is not None]
        if without and not is_given:
            raise UsageError(f"it is an option of {needed}, which is not given", where=without[0])
    if layers and (against is None or perplexity is not None):
        raise UsageError("it needs --against, and goes without --perplexity", where="--layers")


def _measure(
    model: Path,
    text: Path,
    against: Path | None,
    options: MetaOptions | None,
    context: int | None,
    chunks: int | None,
    float32: bool,
    html: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    import llamatools_runtime as runtime

    if html is not None:  # known now, and not after hours
        from ..draft import check_destination

        check_destination(html, (), force=force)
    with Bar("chunk") as bar:

        def on_chunk(done: int, total: int, so_far: runtime.Quality) -> None:
            bar(done, total, f"perplexity {so_far.perplexity:.3f}")

        quality = runtime.measure(
            model,
            text,
            context=context or runtime.CONTEXT,
            chunks=chunks,
            float32=float32,
            against=None if against is None else _opened(against, options),
            on_chunk=on_chunk,
        )
    print_report(quality, as_json)
    if html is not None:
        names = runtime.Names(str(model), str(text), None if against is None else str(against))
        runtime.write_page(quality, names, html, force=force)


def _opened(path: Path, options: MetaOptions | None) -> Checkpoint:
    from ..recognise import open as open_checkpoint

    return open_checkpoint(path, options)
