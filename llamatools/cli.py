"""The command line: parse, call the library once, print. Data go to stdout, progress and prose to stderr.

The only module that imports typer, and the only place where errors become exit codes (docs/reference/exit-codes.md).
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from .errors import (
    EXIT_FINDINGS,
    EXIT_NO_SPACE,
    EXIT_SIGINT,
    EXIT_SIGPIPE,
    EXIT_SOUND,
    EXIT_USAGE,
    FormatError,
    Interrupted,
    LlamatoolsError,
    UsageError,
    in_file,
    printable,
)
from .version import __version__

if TYPE_CHECKING:
    from .check import Finding
    from .check.memory import Need
    from .check.residency import Residency
    from .checkpoint import Checkpoint
    from .conversion import Conversion
    from .formats.meta import MetaOptions
    from .layout import Layout
    from .quantization import QuantizeOptions
    from .strip import Line
    from .views import Table

SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

app = typer.Typer(
    name="llamatools",
    help="LLaMA model files: converted, explained, run and proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE", help="Folder with params.json, consolidated.NN.pth and tokenizer.model; or a GGUF file."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Threads = Annotated[
    int | None, typer.Option(help="Threads; as many as processors by default. Never changes the result.")
]
Dest = Annotated[Path, typer.Argument(metavar="DEST", help="The GGUF file to write.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the file that would be written; write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace DEST if it exists.")]
ImatrixFile = Annotated[
    Path | None, typer.Option("--imatrix", metavar="FILE", help="Weigh errors by this importance matrix of llama.cpp.")
]
RoundingName = Annotated[
    str, typer.Option("--rounding", help="exact (llama-quantize's bytes) or search (better ones, with an imatrix).")
]
TensorTypes = Annotated[
    list[str] | None,
    typer.Option("--tensor-type", metavar="REGEX=TYPE", help="A rule before the recipe's own. Repeatable."),
]
Pure = Annotated[bool, typer.Option("--pure", help="Give every matrix the recipe's main type.")]
OutputType = Annotated[str | None, typer.Option("--output-type", metavar="TYPE", help="Of output.weight.")]
EmbeddingType = Annotated[str | None, typer.Option("--embedding-type", metavar="TYPE", help="Of token_embd.weight.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="Rows that do not divide into blocks, and a file's idle rules, are errors.")
]
PrintRecipe = Annotated[
    bool, typer.Option("--print-recipe", help="Print the rules, in the form of a recipe file; write nothing.")
]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write what was lost in each tensor as JSON.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llamatools {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def convert(
    source: Source,
    dest: Dest,
    dtype: Annotated[
        str, typer.Option(help="auto (keep each matrix's own), f32, f16, bf16, or a recipe of quantize.")
    ] = "auto",
    align: Annotated[
        int | None,
        typer.Option(help="Alignment of every tensor: a power of two from 32 to 2097152. 32, or what a GGUF states."),
    ] = None,
    split_size: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Write files of at most this size, such as 2G: DEST-00001-of-0000N.gguf."),
    ] = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    force: Force = False,
    verify: Annotated[
        bool, typer.Option("--verify-source", help="First check the source's checksums: checklist.chk and CRC-32.")
    ] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.model, if it lies elsewhere.")] = None,
    pad_vocab: Annotated[
        bool, typer.Option("--pad-vocab", help="Fill the vocabulary up to the embedding's rows.")
    ] = False,
    context: Annotated[int | None, typer.Option(help="Context in tokens.", min=1)] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Base of the rotary embedding.")] = None,
    rope_factor: Annotated[float | None, typer.Option(help="Factor of scaled RoPE; 1 is none.")] = None,
    norm_eps: Annotated[float | None, typer.Option(help="Epsilon of the norms.")] = None,
    instruct: Annotated[
        bool, typer.Option("--instruct", help="The model takes turns: the id that ends a turn ends the text.")
    ] = False,
    chat_template: Annotated[Path | None, typer.Option(help="File to store as chat template; never executed.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a metadata key. Repeatable.")
    ] = None,
    imatrix: ImatrixFile = None,
    rounding: RoundingName = "exact",
    tensor_types: TensorTypes = None,
    pure: Pure = False,
    output_type: OutputType = None,
    embedding_type: EmbeddingType = None,
    strict: Strict = False,
    print_recipe: PrintRecipe = False,
    report: ReportFile = None,
    as_json: Json = False,
) -> None:
    """Convert a Meta checkpoint to an aligned GGUF file. Any runtime can map it.

    A GGUF file is laid out anew: mended where its offsets or padding are wrong, aligned, split, or joined if it is one
    of a set. Only --align, --split-size, --threads, --dry-run, --force, --name, --set and --json are for it.
    The options from --imatrix to --report are those of quantize, for a recipe as --dtype.
    """
    from .conversion import DTYPES, recipe_of
    from .conversion import convert as convert_checkpoint

    if dtype.lower() in DTYPES:
        dtype = dtype.lower()
        for option, is_given in (("--report", report), ("--print-recipe", print_recipe)):
            if is_given:
                raise UsageError(f"{dtype} is no recipe, which it needs", where=option, todo="Name one with --dtype")
    options = _meta_options(tokenizer, pad_vocab, instruct, chat_template, (context, rope_theta, rope_factor, norm_eps))
    quantizing = _quantize_options(imatrix, rounding, tensor_types, pure, output_type, embedding_type, strict, False)
    keys = _pairs(settings or [])
    if print_recipe:
        rules = recipe_of(source, dtype, options=quantizing, checkpoint_options=options, settings=keys)
        print(rules.text(), end="")
        return
    _check_report(report, dest)
    with _Bar() as bar:
        done = convert_checkpoint(
            source,
            dest,
            dtype=dtype,
            alignment=align,
            split_size=None if split_size is None else _nbytes(split_size),
            threads=threads,
            dry_run=dry_run,
            force=force,
            options=options,
            name=name,
            settings=keys,
            verify=verify,
            quantizing=quantizing,
            on_progress=bar,
        )
    _write_report(done, report)
    _print_conversion(done, dest, as_json)


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(metavar="SOURCE.gguf", help="The GGUF file to quantize.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST.gguf", help="The GGUF file to write.")],
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name, such as q4_k_m, or the file of a recipe.")],
    imatrix: ImatrixFile = None,
    rounding: RoundingName = "exact",
    tensor_types: TensorTypes = None,
    pure: Pure = False,
    output_type: OutputType = None,
    embedding_type: EmbeddingType = None,
    strict: Strict = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantize quantized weights again, though that adds to the loss.")
    ] = False,
    print_recipe: PrintRecipe = False,
    align: Annotated[int | None, typer.Option(help="Alignment of every tensor; the source's by default.")] = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    force: Force = False,
    verify: Annotated[
        bool,
        typer.Option("--verify-source", help="Hold the weights read against the SHA-256 that llamatools stored."),
    ] = False,
    report: ReportFile = None,
    as_json: Json = False,
) -> None:
    """Quantize a GGUF file. Each tensor gets the type that the recipe gives it.

    Named recipes are q4_0 q4_1 q5_0 q5_1 q8_0 q4_k_s q4_k_m q5_k_s q5_k_m q6_k iq4_nl iq4_xs.
    """
    from . import conversion

    options = _quantize_options(
        imatrix, rounding, tensor_types, pure, output_type, embedding_type, strict, allow_requantize
    )
    if print_recipe:
        print(conversion.recipe_of(source, recipe, options=options).text(), end="")
        return
    _check_report(report, dest)
    with _Bar() as bar:
        done = conversion.quantize(
            source,
            dest,
            recipe,
            options=options,
            alignment=align,
            threads=threads,
            dry_run=dry_run,
            force=force,
            verify=verify,
            on_progress=bar,
        )
    _write_report(done, report)
    _print_conversion(done, dest, as_json)


@app.command()
def inspect(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="GGUF, safetensors, .pth or ggjt files, Hugging Face or Meta folders."),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor and where it lies.")] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="List every metadata key.")] = False,
    match: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Only names in which this regular expression is found.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Show long values of metadata whole.")] = False,
    align: Annotated[
        int | None, typer.Option(help="Assert that every tensor begins at a multiple of this power of two.", min=1)
    ] = None,
    scan: Annotated[
        bool, typer.Option("--scan", help="Also read the weights: NaN, infinities, zeros, impossible scales.")
    ] = False,
    hashes: Annotated[
        bool, typer.Option("--hash", help="SHA-256 of tensors, metadata and weights, held against those stored inside.")
    ] = False,
    other: Annotated[
        Path | None, typer.Option("--diff", metavar="B", help="Compare weights, tokenizer and metadata with model B.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="SOURCE", help="Prove, byte for byte, that PATH is what SOURCE is converted to."),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="That PATH was quantized by, for --against.")
    ] = None,
    threads: Threads = None,
    layout_strip: Annotated[
        bool, typer.Option("--layout", help="Draw the file to scale. --match zooms, from the first to the last found.")
    ] = False,
    residency: Annotated[
        bool, typer.Option("--residency", help="Which pages of each tensor are in the page cache now.")
    ] = False,
    memory: Annotated[bool, typer.Option("--memory", help="What running the model takes of memory.")] = False,
    context: Annotated[
        int | None, typer.Option(help="Tokens that --memory counts with; the model's context by default.", min=1)
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write all of this as one page for a browser.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --html if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Show what is in a model file, where, and what is wrong with it. Nothing in it is executed."""
    from . import overview, views

    if hashes or other or against or imatrix:
        raise typer.Exit(_compare(paths, hashes, other, against, imatrix, match, threads, as_json))
    if html is not None and len(paths) > 1:
        raise UsageError(f"a page shows one model, and {len(paths)} are named", where="--html")
    if context is not None and not memory:
        raise UsageError("says how many tokens --memory counts with. Add --memory", where="--context")
    is_view = tensors or metadata or layout_strip or residency or memory or match is not None
    code, reports = 0, []
    for n, path in enumerate(paths):
        try:
            layout, findings = _inspected(path, align, scan, threads)
            resident, needs = _in_memory(layout, residency, memory, context)
        except LlamatoolsError as error:
            if len(paths) == 1 or isinstance(error, UsageError):
                raise
            print(error, file=sys.stderr)
            code = max(code, error.exit_code)
            continue
        if any(finding.severity == "error" for finding in findings):
            code = max(code, EXIT_FINDINGS)
        if html is not None:
            from .page import write_page

            write_page(layout, findings, html, force=force)
        if as_json:
            facts = views.as_json(layout, match, findings=findings, full=full)
            reports.append(facts | _memory_json(layout, match, resident, needs))
            continue
        if html is not None and not is_view:
            continue
        if n:
            print()
        if metadata:
            _print_table(views.metadata_table(layout, match, full=full))
        if layout_strip:
            from . import strip

            _print_styled(strip.lines(layout, match, resident=resident))
        if resident or needs:
            _print_memory(layout, match, resident, needs, is_drawn=layout_strip)
        if tensors or (match is not None and not (metadata or layout_strip or residency or memory)):
            _print_table(views.tensor_table(layout, match))
        if not is_view:
            for line in overview.overview(layout, findings):
                print(line)
        else:
            for line in overview.finding_lines(findings):
                print(line, file=sys.stderr)
    if as_json:
        _print_json(reports[0] if len(paths) == 1 else reports)
    raise typer.Exit(code)


def _compare(
    paths: list[Path],
    hashes: bool,
    other: Path | None,
    against: Path | None,
    imatrix: Path | None,
    match: str | None,
    threads: int | None,
    as_json: bool,
) -> int:
    """--hash, --diff and --against; the exit code."""
    from . import sameness

    if hashes + (other is not None) + (against is not None) > 1:
        raise UsageError("one at a time", where="--hash, --diff, --against")
    if imatrix and not against:
        raise UsageError("only --against makes use of it", where="--imatrix")
    if not hashes and len(paths) > 1:
        raise UsageError(f"takes one PATH, not {len(paths)}", where="--diff" if other else "--against")
    shown = []
    for path in paths:
        with _Bar() as bar:
            if other:
                shown.append(sameness.diff(path, other, match, threads, bar))
            elif against:
                shown.append(sameness.prove(path, against, imatrix, match, threads, bar))
            else:
                shown.append(sameness.digests(path, match, threads, bar))
    if as_json:
        _print_json(shown[0].facts if len(shown) == 1 else [each.facts for each in shown])
    for each in shown:
        if not as_json:
            _print_table(each.table)
            for line in each.lines:
                print(line)
    return EXIT_SOUND if all(each.sound for each in shown) else EXIT_FINDINGS


def _in_memory(
    layout: Layout, residency: bool, memory: bool, context: int | None
) -> tuple[dict[int, Residency], list[Need]]:
    if not (residency or memory):
        return {}, []
    from .check.memory import needs
    from .memory_views import residencies

    return residencies(layout) if residency else {}, needs(layout, context) if memory else []


def _memory_json(
    layout: Layout, match: str | None, resident: dict[int, Residency], needs: list[Need]
) -> dict[str, Any]:
    if not (resident or needs):
        return {}
    from .memory_views import needs_json, residency_json

    facts: dict[str, Any] = {"residency": residency_json(layout, resident, match)} if resident else {}
    return facts | ({"memory": needs_json(needs)} if needs else {})


def _print_memory(
    layout: Layout, match: str | None, resident: dict[int, Residency], needs: list[Need], *, is_drawn: bool
) -> None:
    from . import memory_views

    for line in memory_views.needs_lines(needs):
        print(line)
    if resident:
        if not is_drawn:
            _print_table(memory_views.residency_table(layout, resident, match))
        for line in memory_views.residency_lines(layout, resident):
            print(line)


def _inspected(path: Path, align: int | None, scan: bool, threads: int | None) -> tuple[Layout, list[Finding]]:
    from .check import by_severity, findings
    from .recognise import inspect as inspect_path

    layout = inspect_path(path)
    found = findings(layout, align=align)
    if scan:
        from .check.scan import scan as scan_weights
        from .fill import default_threads

        with _Bar() as bar:
            found += scan_weights(layout, threads=threads or default_threads(), on_progress=bar)
    return layout, by_severity(found)


@app.command()
def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The GGUF file to run.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens to write at most.", min=0)] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 1 samples as trained.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that make up this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 is all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling; the same seed gives the same text.")] = None,
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
    context: Annotated[int | None, typer.Option(help="Of --perplexity: tokens of a chunk. [default: 512]")] = None,
    chunks: Annotated[int | None, typer.Option(help="Of --perplexity: how many are read; all by default.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Of --perplexity: write it as a page for a browser.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --html if it exists.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Of --against: tell in which layer and matrix the two part, and why.")
    ] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="The checkpoint's tokenizer.model, if elsewhere.")] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Of the checkpoint, as it was stated to convert.")] = None,
    rope_factor: Annotated[float | None, typer.Option(help="Of the checkpoint, likewise.")] = None,
    norm_eps: Annotated[float | None, typer.Option(help="Of the checkpoint, likewise.")] = None,
    as_json: Json = False,
) -> None:
    """Run a GGUF file from its mapping, or prove it right. --against compares it with what the original computes."""
    import llamatools_runtime as runtime

    _check_run_options(perplexity, against, layers, {"--context": context, "--chunks": chunks, "--html": html})
    options = _meta_options(tokenizer, overrides=(None, rope_theta, rope_factor, norm_eps))
    if perplexity is not None:
        _measure(model, perplexity, against, options, context, chunks, html, force, as_json)
        return
    if layers and against is not None:
        parting = runtime.part(model, _opened(against, options), prompt=prompt or None)
        _print_report(parting, as_json)
        if not parting.same:
            raise typer.Exit(EXIT_FINDINGS)
        return
    if against is None:
        report = runtime.run(
            model,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_text=None if as_json else _print_text,
        )
        if as_json:
            _print_json(report.as_dict())
        else:
            print()
        for line in report.lines():
            print(line, file=sys.stderr)
        return
    comparison = runtime.compare(model, _opened(against, options), prompt=prompt or None, tokenizer=tokenizer)
    _print_report(comparison, as_json)
    if not comparison.passed:
        raise typer.Exit(EXIT_FINDINGS)


def _check_run_options(
    perplexity: Path | None, against: Path | None, layers: bool, of_perplexity: dict[str, object]
) -> None:
    given = [name for name, value in of_perplexity.items() if value is not None]
    if perplexity is None and given:
        raise UsageError("it is an option of --perplexity, which is not given", where=given[0])
    if layers and (against is None or perplexity is not None):
        raise UsageError("it needs --against, and goes without --perplexity", where="--layers")


def _measure(
    model: Path,
    text: Path,
    against: Path | None,
    options: MetaOptions,
    context: int | None,
    chunks: int | None,
    html: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    import llamatools_runtime as runtime

    if html is not None:  # known now, and not after hours
        from .draft import check_destination

        check_destination(html, (), force=force)
    with _Bar("chunk") as bar:

        def on_chunk(done: int, total: int, so_far: runtime.Quality) -> None:
            bar(done, total, f"perplexity {so_far.perplexity:.3f}")

        quality = runtime.measure(
            model,
            text,
            context=context or runtime.CONTEXT,
            chunks=chunks,
            against=None if against is None else _opened(against, options),
            on_chunk=on_chunk,
        )
    _print_report(quality, as_json)
    if html is not None:
        names = runtime.Names(str(model), str(text), None if against is None else str(against))
        runtime.write_page(quality, names, html, force=force)


def _opened(path: Path, options: MetaOptions) -> Checkpoint:
    from .recognise import open as open_checkpoint

    return open_checkpoint(path, options)


class _Report(Protocol):
    """What the runtime found: for JSON, and as lines for people."""

    def as_dict(self) -> dict[str, Any]: ...
    def lines(self) -> list[str]: ...


def _print_report(report: _Report, as_json: bool) -> None:
    if as_json:
        _print_json(report.as_dict())
    else:
        for line in report.lines():
            print(line)


def _meta_options(
    tokenizer: Path | None,
    pad_vocab: bool = False,
    instruct: bool = False,
    chat_template: Path | None = None,
    overrides: tuple[int | None, float | None, float | None, float | None] = (None, None, None, None),
) -> MetaOptions:
    from .formats.meta import MetaOptions
    from .formats.meta_params import Overrides

    template = None
    if chat_template:
        with in_file(chat_template):
            try:
                template = chat_template.read_text("utf-8")
            except UnicodeDecodeError as error:
                raise FormatError(f"not UTF-8 text from byte {error.start} on", todo="Name a chat template") from error
    for option, value in zip(("--rope-theta", "--rope-factor", "--norm-eps"), overrides[1:], strict=True):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{value:g} is out of range", where=option)
    return MetaOptions(tokenizer, Overrides(*overrides), instruct, pad_vocab, template)


def _quantize_options(
    imatrix: Path | None,
    rounding: str,
    tensor_types: list[str] | None,
    pure: bool,
    output_type: str | None,
    embedding_type: str | None,
    strict: bool,
    allow_requantize: bool,
) -> QuantizeOptions:
    from .quantization import QuantizeOptions

    return QuantizeOptions(
        imatrix,
        rounding.lower(),
        tuple(tensor_types or ()),
        pure,
        output_type,
        embedding_type,
        strict,
        allow_requantize,
    )


def _nbytes(text: str) -> int:
    """A number of bytes as people write it: 2G is 2,000,000,000, as for llama-gguf-split."""
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in SIZES else (text, "")
    if not (number.isascii() and number.isdigit()):
        raise UsageError(f"{text!r} is no number of bytes", where="--split-size", todo="Such as 2G, 500M or 4096")
    return int(number) * SIZES[unit]


def _check_report(path: Path | None, model: Path) -> None:
    if path is not None:
        from .reports import check_report

        check_report(path, model)


def _write_report(done: Conversion, path: Path | None) -> None:
    if path is not None:
        from .reports import write_report

        write_report(done, path)


def _pairs(settings: list[str]) -> dict[str, str]:
    pairs = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise UsageError("KEY=VALUE is required", where=f"--set {setting}")
        pairs[key] = value
    return pairs


def _print_conversion(done: Conversion, dest: Path, as_json: bool) -> None:
    from . import reports, views

    layout = done.layout
    for line in done.verified:
        print(f"verified  {line}", file=sys.stderr)
    for line in done.mended:
        print(f"mended    {line}", file=sys.stderr)
    for line in views.note_lines(layout.notes):
        print(f"derived   {line}", file=sys.stderr)
    for tensor, reason in layout.dropped.items():
        print(f"left out  {printable(tensor)}: {reason}", file=sys.stderr)
    for tensor, loss in done.losses.items():
        print(f"lost      {tensor}: {loss.overflows} weights overflowed, {loss.flushes} became 0", file=sys.stderr)
    if done.changes:
        for line in reports.lines(done):
            print(line, file=sys.stderr)
    if as_json:
        facts: dict[str, Any] = views.as_json(layout)
        facts |= {"written": done.written, "threads": done.threads, "buffer_nbytes": done.memory}
        facts["mended"] = list(done.mended)
        facts["losses"] = {name: vars(loss) for name, loss in done.losses.items()}
        if done.changes:
            facts["quantized"] = reports.as_json(done)
        _print_json(facts)
    elif done.written:
        if done.changes:
            _print_table(reports.table(done.changes))
        rate = layout.size / max(done.seconds, 1e-9) / 1e6
        size = f"{views.human_bytes(layout.size)}, {len(layout.tensors)} tensors"
        written = dest if len(layout.files) == 1 else f"{layout.files[0].path} and {len(layout.files) - 1} more"
        print(f"{written}: {layout.format}, {size}, in {done.seconds:.1f} s ({rate:,.0f} MB/s)", file=sys.stderr)
    else:
        _print_table(views.tensor_table(layout))
        if layout.data_offset is not None:
            print(f"header    bytes 0 to {layout.data_offset}")
            print(f"data      bytes {layout.data_offset} to {layout.size}, tensors aligned to {layout.alignment}")
        for file in layout.files:
            print(f"disk      {file.size:,} bytes for {file.path}")
        print(f"memory    {views.human_bytes(done.memory)} of buffers at most, for {done.threads} threads")


def _print_table(table: Table) -> None:
    """A rich table on a terminal that is wide enough for it, aligned plain text in a pipe."""
    if not sys.stdout.isatty():
        for line in table.lines():
            print(line)
        return
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    rich_table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for n, heading in enumerate(table.headings):
        right = n in table.right
        rich_table.add_column(heading, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in table.rows:
        rich_table.add_row(*map(Text, row))
    Console(highlight=False).print(rich_table)


def _print_styled(lines: Iterable[Line]) -> None:
    """Pieces of text in their styles on a terminal, without them in a pipe."""
    if not sys.stdout.isatty():
        for line in lines:
            print("".join(text for text, _ in line).rstrip())
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in lines:
        console.print(Text.assemble(*line), no_wrap=True, crop=False, overflow="ignore")


def _print_json(facts: dict[str, Any] | list[dict[str, Any]]) -> None:
    print(json.dumps(facts, indent=2))


def _print_text(text: str) -> None:
    print(text, end="", flush=True)


class _Bar:
    """A progress bar on stderr, if that is a terminal; made when there is something to show."""

    def __init__(self, unit: str = "B") -> None:
        self._bar: Any = None
        self._unit = unit

    def __enter__(self) -> _Bar:
        return self

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if self._bar is None:
            if not sys.stderr.isatty():
                return
            from tqdm import tqdm

            scaled = self._unit == "B"
            self._bar = tqdm(total=total, unit=self._unit, unit_scale=scaled, leave=False, dynamic_ncols=True)
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


# Raised by the parser for bad arguments. Typer exports its subclass only, since it carries click inside.
_ParserError: Any = typer.BadParameter.__base__


def _run() -> int:
    try:
        code: int = app(prog_name="llamatools", standalone_mode=False) or 0
    except _ParserError as error:
        message = error.format_message()
        if len(sys.argv) > 1:  # without arguments, the message is the help
            command = error.ctx.command_path if error.ctx else "llamatools"
            message = f"{message.rstrip('.')}. See {command} --help"
        print(message, file=sys.stderr)
        return EXIT_USAGE
    except SystemExit:  # how the parser ends where stdout's reader has gone
        raise BrokenPipeError from None
    if code == EXIT_SIGINT:  # the parser swallows the exception
        raise KeyboardInterrupt
    return code


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; the clean-up is not to be disturbed
    raise Interrupted


def _prepare_streams() -> None:
    """A closed stream takes everything and keeps nothing; what stdout's encoding has no letter for is escaped."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main() -> None:
    """Runs the command line and exits with its code; whatever goes wrong is one line on stderr."""
    signal.signal(signal.SIGTERM, _terminate)
    _prepare_streams()
    try:
        code = _run()
        sys.stdout.flush()
    except LlamatoolsError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        code = EXIT_SIGINT
    except Interrupted as error:
        print("terminated; nothing was left behind", file=sys.stderr)
        code = error.exit_code
    except MemoryError:
        print("not enough memory", file=sys.stderr)
        code = EXIT_NO_SPACE
    except BrokenPipeError:  # as of `llamatools inspect ... | head`: who reads no more wants to hear no more
        code = EXIT_SIGPIPE
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (so that the interpreter does not try again)
    except OSError as error:  # stdout is full; files are worded where they are opened
        print(f"stdout: {printable(error.strerror or str(error))}", file=sys.stderr)
        code = EXIT_NO_SPACE
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(code)
