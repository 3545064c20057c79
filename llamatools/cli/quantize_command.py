"""`llamatools quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    quantize_options,
)
from .printing import Bar


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
    from .. import conversion

    options = quantize_options(
        imatrix, rounding, tensor_types, pure, output_type, embedding_type, strict, allow_requantize
    )
    if print_recipe:
        print(conversion.recipe_of(source, recipe, options=options).text(), end="")
        return
    check_report(report, dest)
    with Bar() as bar:
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
    write_report(done, report)
    print_conversion(done, dest, as_json)
