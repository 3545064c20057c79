"""`llamatools convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .converted import check_report, print_conversion, write_report
from .options import (
    DryRun,
    EmbeddingType,
    Force,
    ImatrixFile,
    Json,
    OutputType,
    PrintRecipe,
    Pure,
    ReportFile,
    RoundingName,
    Strict,
    TensorTypes,
    Threads,
    meta_options,
    quantize_options,
)
from .printing import Bar

SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE", help="Folder with params.json, consolidated.NN.pth and tokenizer.model; or a GGUF file."
    ),
]
Dest = Annotated[Path, typer.Argument(metavar="DEST", help="The GGUF file to write.")]


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
    from ..conversion import DTYPES, recipe_of
    from ..conversion import convert as convert_checkpoint

    if dtype.lower() in DTYPES:
        dtype = dtype.lower()
        for option, is_given in (("--report", report), ("--print-recipe", print_recipe)):
            if is_given:
                raise UsageError(f"{dtype} is no recipe, which it needs", where=option, todo="Name one with --dtype")
    options = meta_options(tokenizer, pad_vocab, instruct, chat_template, (context, rope_theta, rope_factor, norm_eps))
    quantizing = quantize_options(imatrix, rounding, tensor_types, pure, output_type, embedding_type, strict, False)
    keys = _pairs(settings or [])
    if print_recipe:
        rules = recipe_of(source, dtype, options=quantizing, checkpoint_options=options, settings=keys)
        print(rules.text(), end="")
        return
    check_report(report, dest)
    with Bar() as bar:
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
    write_report(done, report)
    print_conversion(done, dest, as_json)


def _nbytes(text: str) -> int:
    """A number of bytes as people write it: 2G is 2,000,000,000, as for llama-gguf-split."""
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in SIZES else (text, "")
    if not (number.isascii() and number.isdigit()):
        raise UsageError(f"{text!r} is no number of bytes", where="--split-size", todo="Such as 2G, 500M or 4096")
    return int(number) * SIZES[unit]


def _pairs(settings: list[str]) -> dict[str, str]:
    pairs = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise UsageError("KEY=VALUE is required", where=f"--set {setting}")
        pairs[key] = value
    return pairs
