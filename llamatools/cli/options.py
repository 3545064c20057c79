"""Options that more than one command has, and what their values make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import FormatError, UsageError, in_file

if TYPE_CHECKING:
    from ..formats.meta import MetaOptions
    from ..quantization import QuantizeOptions

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Threads = Annotated[
    int | None, typer.Option(help="Threads; as many as processors by default. Never changes the result.")
]
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


def meta_options(
    tokenizer: Path | None,
    pad_vocab: bool = False,
    instruct: bool = False,
    chat_template: Path | None = None,
    overrides: tuple[int | None, float | None, float | None, float | None] = (None, None, None, None),
) -> MetaOptions:
    from ..formats.meta import MetaOptions
    from ..formats.meta_params import Overrides

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


def quantize_options(
    imatrix: Path | None,
    rounding: str,
    tensor_types: list[str] | None,
    pure: bool,
    output_type: str | None,
    embedding_type: str | None,
    strict: bool,
    allow_requantize: bool,
) -> QuantizeOptions:
    from ..quantization import QuantizeOptions

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
