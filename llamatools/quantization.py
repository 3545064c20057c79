"""Planning a quantized file: a GGUF, read or itself still planned, and a recipe become the layout to write.

So a Meta checkpoint is quantized in one pass by planning twice: first the GGUF that `convert` would write, then what
`quantize` would make of it. Only the second is filled, with the same bytes as if the first had been.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import names, provenance
from .checkpoint import Note
from .dtypes import DType, Floats
from .dtypes.rounding import Rounding
from .errors import FormatError, UsageError, in_file
from .formats.gguf_write import DEFAULT_ALIGNMENT
from .formats.imatrix import Imatrix, read_imatrix
from .importance import of_the_head
from .layout import Layout, PlacedTensor
from .metadata import Value, string, u32
from .mixtures import recipe_for
from .plan import Plan, placed
from .recipes import Choice, Recipe, choose, file_type, parse_rule, writable
from .tensors import Cast, LazyTensor

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION: of the block layouts
FILE_TYPE_KEY, VERSION_KEY = "general.file_type", "general.quantization_version"
MAX_IMATRIX_NBYTES = 127  # of a text about the imatrix, as llama-quantize cuts it


@dataclass(frozen=True)
class QuantizeOptions:
    """What a user may ask for besides the recipe.

    imatrix: file of importances. rounding: "exact" writes llama-quantize's bytes, "search" looks for less weighted
    error, for which it needs an imatrix. tensor_types: rules PATTERN=DTYPE before the recipe's own. pure: every matrix
    gets the recipe's main dtype. output_type, embedding_type: dtypes by name. strict: rows that do not divide, and
    rules of a recipe file that decide no tensor, are errors. allow_requantize: quantized weights may be quantized
    again. measure: compute what is lost.
    """

    imatrix: str | os.PathLike[str] | None = None
    rounding: str = "exact"
    tensor_types: Sequence[str] = ()
    pure: bool = False
    output_type: str | None = None
    embedding_type: str | None = None
    strict: bool = False
    allow_requantize: bool = False
    measure: bool = True


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor.

    before: its dtype in the source. after: in the file. wanted: what the recipe says, where rows do not divide into
    its blocks. weighted: whether by the imatrix; None where none was given, or nothing to be weighted.
    rounding: what was lost, where that was measured.
    """

    name: str
    shape: tuple[int, ...]
    n_weights: int
    before: DType
    after: DType
    wanted: DType
    nbytes_before: int
    nbytes: int
    weighted: bool | None = None
    rounding: Rounding | None = None

    @property
    def is_copy(self) -> bool:
        return self.before is self.after

    @property
    def is_requantized(self) -> bool:
        return self.before.is_quantized and not self.is_copy


def read_plan(layout: Layout) -> Plan:
    """A GGUF that was read, as if it were to be written again: the plan that `plan_quantized` starts from.

    Where it was made by llamatools, what it was made from is carried over; else its files are named as source. A set
    of files becomes one.
    """
    metadata = {key: value for key, value in layout.metadata.items() if not key.startswith("split.")}
    if provenance.SOURCE_FILES not in metadata:
        metadata |= provenance.file_keys((file.path, file.size) for file in layout.files)
    return Plan(replace(layout, metadata=metadata))


def plan_quantized(
    plan: Plan,
    destination: Path,
    recipe: Recipe,
    options: QuantizeOptions,
    alignment: int | None = None,
) -> tuple[Plan, tuple[Change, ...]]:
    """The file that `plan` becomes when its tensors get the dtypes of `recipe`, and what changes.

    alignment: None keeps the plan's. Raises UsageError for a request that cannot be met, FormatError for an imatrix
    that is damaged or of another model, UnsupportedError for weights that cannot be decoded.
    """
    if options.rounding not in ("exact", "search"):
        raise UsageError(f"unknown rounding {options.rounding!r}", where="--rounding", todo="It is exact or search")
    if options.rounding == "search" and options.imatrix is None:
        raise UsageError(
            "less error in the weights was found to be no better without an imatrix",
            where="--rounding search",
            todo="Name one with --imatrix",
        )
    if options.strict and recipe.idle:
        raise UsageError(
            "decides no tensor of this model", where=f"rule '{recipe.idle[0]}' of {recipe.name}", todo="Take it out"
        )
    layout = plan.layout
    imatrix = None if options.imatrix is None else read_imatrix(options.imatrix)
    choices = choose(recipe, layout.tensors, strict=options.strict)
    importance = {} if imatrix is None else _importance(imatrix, layout.tensors, choices)
    if options.rounding == "search":
        importance |= of_the_head(importance, layout.tensors)

    tensors, changes = [], []
    for tensor in layout.tensors:
        choice = choices[tensor.name]
        _check_requantizing(tensor, choice.dtype, options)
        source = _source(tensor, choice.dtype, importance.get(tensor.name), search=options.rounding == "search")
        tensors.append(replace(tensor, dtype=source.dtype, nbytes=source.nbytes, source=source))
        changes.append(_change(tensor, source, choice, imatrix, importance))
    n_weights: Counter[DType] = Counter()
    for tensor in tensors:
        n_weights[tensor.dtype] += tensor.n_weights
    metadata = {
        **layout.metadata,
        FILE_TYPE_KEY: u32(file_type(recipe, n_weights)),
        VERSION_KEY: u32(QUANTIZATION_VERSION),
        **(imatrix_keys(imatrix) if imatrix else {}),
    }
    kept = layout.alignment or DEFAULT_ALIGNMENT
    notes = layout.notes
    if alignment is None:
        alignment = max(kept, DEFAULT_ALIGNMENT)
        if alignment > kept:
            reason = f"the source's is {kept}, which is not written"
            notes += (Note("alignment", str(alignment), reason, "--align"),)
    layout = replace(layout, tensors=tuple(tensors), metadata=metadata, notes=notes)
    return placed(layout, destination, alignment, plan.checkpoint), tuple(changes)


def the_recipe(layout: Layout, recipe: str | os.PathLike[str], options: QuantizeOptions) -> Recipe:
    """The rules for this model. Raises what `recipe_for` and `parse_rule` raise."""
    overrides = [parse_rule(text, where=f"--tensor-type {text}") for text in options.tensor_types]
    output, embedding = (
        None if name is None else writable(name, where=option)
        for name, option in ((options.output_type, "--output-type"), (options.embedding_type, "--embedding-type"))
    )
    return recipe_for(
        recipe,
        layout.tensors,
        layout.metadata,
        has_imatrix=options.imatrix is not None,
        pure=options.pure,
        output_type=output,
        embedding_type=embedding,
        overrides=overrides,
    )


def _check_requantizing(tensor: PlacedTensor, dtype: DType, options: QuantizeOptions) -> None:
    if tensor.dtype.is_quantized and dtype is not tensor.dtype and not options.allow_requantize:
        raise UsageError(
            f"its weights are {tensor.dtype} already; making {dtype} of them adds an error to the one they have, which "
            "the report cannot tell",
            where=f"tensor {tensor.name!r}",
            todo="Quantize the original, or add --allow-requantize",
        )


def _source(tensor: PlacedTensor, dtype: DType, importance: Floats | None, search: bool) -> LazyTensor:
    assert tensor.source is not None, "the tensors of a plan have sources"
    if dtype is tensor.dtype:
        return tensor.source
    return Cast(tensor.source, dtype, importance, dtype.search if search and importance is not None else None)


def _change(
    tensor: PlacedTensor, source: LazyTensor, choice: Choice, imatrix: Imatrix | None, importance: Mapping[str, Floats]
) -> Change:
    weighted = None
    if imatrix and source.dtype.is_quantized and source.dtype is not tensor.dtype:
        weighted = tensor.name in importance
    return Change(
        name=tensor.name,
        shape=tensor.shape,
        n_weights=tensor.n_weights,
        before=tensor.dtype,
        after=source.dtype,
        wanted=choice.wanted,
        nbytes_before=tensor.nbytes,
        nbytes=source.nbytes,
        weighted=weighted,
    )


def _importance(imatrix: Imatrix, tensors: Sequence[PlacedTensor], choices: Mapping[str, Choice]) -> dict[str, Floats]:
    """The importance of the columns of each tensor that is quantized and has an entry.

    As in llama.cpp, one for the embedding that does not fit is passed over. Raises FormatError for any other.
    """
    fitting = {}
    with in_file(imatrix.path):
        for tensor in tensors:
            importance = imatrix.importance.get(tensor.name)
            if importance is None or not choices[tensor.name].dtype.is_quantized:
                continue
            n_columns = tensor.shape[-1] * math.prod(tensor.shape[:-2])  # of all experts
            if len(importance) == n_columns:
                fitting[tensor.name] = importance
            elif tensor.name != names.MODEL_TENSORS[names.EMBEDDING]:
                raise FormatError(
                    f"it has {len(importance)} columns here and {n_columns} in the model",
                    where=f"tensor {tensor.name!r}",
                    todo="This imatrix is of another model",
                )
        if not any(tensor.name in imatrix.importance for tensor in tensors):
            raise FormatError(
                f"none of its {len(imatrix.importance)} entries is for a tensor of the model",
                todo="This imatrix is of another model",
            )
    return fitting


def imatrix_keys(imatrix: Imatrix) -> dict[str, Value]:
    """What llama-quantize records of the importance matrix; of the file the name without its folder."""

    def cut(text: str) -> Value:
        return string(text.encode("utf-8", "surrogateescape")[:MAX_IMATRIX_NBYTES].decode("utf-8", "surrogateescape"))

    keys = {"quantize.imatrix.file": cut(imatrix.path.name)}
    if imatrix.datasets:
        keys["quantize.imatrix.dataset"] = cut(imatrix.datasets[0])
    keys["quantize.imatrix.entries_count"] = u32(len(imatrix.importance))
    if imatrix.n_chunks and imatrix.n_chunks > 0:
        keys["quantize.imatrix.chunks_count"] = u32(imatrix.n_chunks)
    return keys
