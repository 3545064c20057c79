"""Recipes: which tensor gets which dtype, as ordered rules that a person can read, edit and keep in a file.

The text form has one rule a line, `PATTERN = DTYPE`. PATTERN is a regular expression that is searched in a tensor's
GGUF name, case kept; DTYPE is a name of the dtype table, or `keep`, which leaves the tensor as it is. The first rule
that matches decides. Lines that begin with `#` are comments, and so is what follows a `#` after DTYPE.

Tensors of one row (norms, biases, the divisors of scaled RoPE) keep their dtype whatever a rule says, as they do in
llama.cpp, whose kernels read them as F32. Every other tensor must be matched by a rule.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from .dtypes import F16, DType, named
from .dtypes.k_quants import Q4_K, Q5_K, Q6_K
from .dtypes.legacy import Q5_0, Q5_1, Q8_0
from .dtypes.nonlinear import IQ4_NL, IQ4_XS
from .errors import FormatError, UnsupportedError, UsageError, in_file, printable

KEEP = "keep"
HEADING = "The first rule whose pattern is found in a tensor's name gives its dtype; `keep` leaves it as it is."
MAX_BYTES = 1 << 20  # of a recipe file; a larger one is a model named in its place

# What llama-quantize takes where rows do not divide into blocks (src/llama-quant.cpp, tensor_type_fallback); F16 where
# they do not divide into the substitute's blocks of 32 either, and for all other dtypes.
SUBSTITUTES = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0, IQ4_XS: IQ4_NL}


class Shaped(Protocol):
    """What a recipe looks at: a LazyTensor or a PlacedTensor, under its GGUF name."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Rule:
    """Tensors whose name contains a match of `pattern` get `dtype`; None keeps the one they have."""

    pattern: str
    dtype: DType | None

    def __str__(self) -> str:
        return f"{self.pattern} = {self.dtype or KEEP}"

    def matches(self, name: str) -> bool:
        return re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; recipes with the same rules are equal.

    name: how it was asked for. file_type: llama.cpp's LLAMA_FTYPE_* number of a named recipe, None for a file's.
    comment: what a reader of its text should know. idle: the rules of a file that decide no tensor of the model.
    """

    rules: tuple[Rule, ...]
    name: str = field(default="", compare=False)
    file_type: int | None = field(default=None, compare=False)
    comment: str = field(default="", compare=False)
    idle: tuple[Rule, ...] = field(default=(), compare=False)

    def text(self) -> str:
        """The recipe in the form that `read_recipe` reads."""
        comments = [f"# {printable(text)}" for text in (self.name, self.comment, HEADING) if text]
        return "\n".join([*comments, *map(str, self.rules)]) + "\n"


@dataclass(frozen=True)
class Choice:
    """The dtype of one tensor.

    dtype: what it gets. wanted: what the rule said; differs where rows do not divide into blocks of that.
    row_length: weights per row. rule: None for a tensor of one row, which no rule decides.
    """

    dtype: DType
    wanted: DType
    row_length: int
    rule: Rule | None

    @property
    def is_substitute(self) -> bool:
        return self.dtype is not self.wanted

    @property
    def reason(self) -> str:
        """Why `dtype` is not what was wanted, as a sentence without its full stop."""
        return f"rows of {self.row_length} weights do not divide into {self.wanted} blocks of {self.wanted.block_size}"


def choose(recipe: Recipe, tensors: Iterable[Shaped], *, strict: bool = False) -> dict[str, Choice]:
    """What each tensor becomes, by name.

    strict: rows that do not divide are an error instead of a substitute.
    Raises UsageError for a tensor that no rule matches, and under `strict`.
    """
    tensors = list(tensors)
    deciding = first_matches(recipe.rules, tensors)
    choices = {}
    for tensor in tensors:
        where = f"tensor {tensor.name!r}"
        rule = deciding[tensor.name]
        if rule is None and not has_one_row(tensor):
            raise UsageError(
                f"no rule of the recipe {recipe.name} matches it", where=where, todo="Add one; `. = keep` keeps all"
            )
        row_length = tensor.shape[-1] if tensor.shape else 1
        wanted = rule.dtype if rule and rule.dtype else tensor.dtype
        choice = Choice(substitute(wanted, row_length), wanted, row_length, rule)
        if strict and choice.is_substitute:
            raise UsageError(choice.reason, where=where, todo=f"Add a rule giving it {choice.dtype}")
        choices[tensor.name] = choice
    return choices


def substitute(dtype: DType, row_length: int) -> DType:
    """`dtype`, or what takes its place where rows of `row_length` weights do not divide into its blocks."""
    if row_length % dtype.block_size:
        dtype = SUBSTITUTES.get(dtype, F16)
    return F16 if row_length % dtype.block_size else dtype


def has_one_row(tensor: Shaped) -> bool:
    """Whether ggml counts one dimension: axes of length 1 in front of the last do not count."""
    return math.prod(tensor.shape[:-1]) == 1


def first_matches(rules: Sequence[Rule], tensors: Iterable[Shaped]) -> dict[str, Rule | None]:
    """The rule that decides each tensor, by name; None where no rule does."""
    return {
        tensor.name: None if has_one_row(tensor) else next((rule for rule in rules if rule.matches(tensor.name)), None)
        for tensor in tensors
    }


def idle_rules(rules: Sequence[Rule], tensors: Iterable[Shaped]) -> list[Rule]:
    """Those of `rules` that decide no tensor."""
    deciding = {id(rule) for rule in first_matches(rules, tensors).values()}
    return [rule for rule in rules if id(rule) not in deciding]


def check_effect(asked: Iterable[Rule], rules: Sequence[Rule], tensors: Sequence[Shaped]) -> None:
    """Raises UsageError where one of the rules that a user `asked` for, each among `rules`, decides no tensor."""
    idle = {id(rule) for rule in idle_rules(rules, tensors)}
    for rule in asked:
        if id(rule) in idle:
            matched = any(rule.matches(tensor.name) for tensor in tensors)
            raise UsageError(
                "the tensors that it matches have one row or are decided by a rule before it"
                if matched
                else "no tensor's name matches it",
                where=f"rule '{rule}'",
                todo="`llamatools inspect` lists the names",
            )


def with_overrides(recipe: Recipe, overrides: Sequence[Rule], tensors: Sequence[Shaped]) -> Recipe:
    """The recipe with `overrides` before its own rules. Raises UsageError for an override that decides no tensor."""
    check_effect(overrides, overrides, tensors)
    return replace(recipe, rules=(*overrides, *recipe.rules))


RULE = re.compile(r"(?P<pattern>[^#\s].*?)[ \t]*=[ \t]*(?P<dtype>\w+)[ \t]*(#.*)?")  # within a line


def parse_rule(text: str, where: str | None = None) -> Rule:
    """The rule that `PATTERN=DTYPE` says, in a file or on the command line; spaces around `=` do not matter.

    where: the place to name in errors. Raises UsageError where it is no rule or the dtype is unknown, UnsupportedError
    for a dtype that llamatools cannot write.
    """
    parts = RULE.fullmatch(text.strip())
    if parts is None:
        raise UsageError(f"{text.strip()!r} is no rule", where=where, todo="A rule is PATTERN = DTYPE")
    pattern = parts["pattern"]
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{pattern!r} is no regular expression: {error}", where=where) from error
    if parts["dtype"].lower() == KEEP:
        return Rule(pattern, None)
    return Rule(pattern, writable(parts["dtype"], where))


def writable(name: str, where: str | None = None) -> DType:
    """The dtype of that name. Raises UsageError for an unknown one, UnsupportedError for one that is only read."""
    try:
        dtype = named(name)
    except UsageError as error:
        error.where = where
        raise
    if dtype.encode is None:
        raise UnsupportedError(f"llamatools cannot write {dtype} weights", where=where)
    return dtype


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a file.

    Raises FormatError where it cannot be read or is no text, and with the line's number what `parse_rule` raises.
    """
    path = Path(path)
    with in_file(path):
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise FormatError(f"more than {MAX_BYTES} bytes, too long for a recipe")
        try:
            lines = data.decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise FormatError(f"byte {error.start} is not UTF-8 text, as a recipe must be") from error
        numbered = ((f"line {n}", line.strip()) for n, line in enumerate(lines, 1))
        rules = tuple(parse_rule(line, where) for where, line in numbered if line and not line.startswith("#"))
        if not rules:
            raise UsageError("no rule in it", todo="A rule is PATTERN = DTYPE")
    return Recipe(rules, path.name)


# general.file_type where no recipe's name gives it: llama.cpp's LLAMA_FTYPE_* by the dtype that most weights have, as
# src/llama-model-loader.cpp guesses it.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26,
    "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39,
    "Q1_0": 40, "Q2_0": 41,
}  # fmt: skip


def file_type(recipe: Recipe, n_weights: Mapping[DType, int]) -> int:
    """general.file_type: the named recipe's, else that of the dtype that most weights have.

    Raises UnsupportedError where llama.cpp has no number for that.
    """
    if recipe.file_type is not None:
        return recipe.file_type
    most = max(n_weights, key=lambda dtype: n_weights[dtype])
    if most.name not in FILE_TYPES:
        raise UnsupportedError(f"most weights are {most}, and no model file of llama.cpp is of that type")
    return FILE_TYPES[most.name]
