"""Named recipes: for a given model, the rules that give every tensor the dtype llama-quantize gives it.

Source of the choices: llama.cpp's src/llama-quant.cpp at b11434 (llama_tensor_get_type_impl and its callers), for the
architecture "llama". What is only stated there as code:

- Layers are counted, not named: the i-th attn_v (or ffn_down) in the order of layers and then of names. Tensors that
  an override decides are not counted. With experts, ffn_down goes by the layer's number.
- The output matrix, or the embedding where it serves as output, is Q6_K, but Q8_0 where its rows do not divide into
  blocks of that, or the recipe's main dtype is Q8_0.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from .dtypes import DType
from .dtypes.k_quants import Q4_K, Q5_K, Q6_K
from .dtypes.legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from .dtypes.nonlinear import IQ4_NL, IQ4_XS
from .errors import FormatError, UnsupportedError, UsageError
from .metadata import INTEGERS, Metadata, string
from .recipes import (
    Recipe,
    Rule,
    Shaped,
    check_effect,
    first_matches,
    has_one_row,
    idle_rules,
    read_recipe,
    with_overrides,
)


class Place(NamedTuple):
    """The i-th of n tensors of a kind, n_gqa query heads per key head, and whether there is an imatrix."""

    i: int
    n: int
    n_gqa: int
    has_imatrix: bool


def more_bits(at: Place) -> bool:
    """The first and the last eighth, and every third between."""
    eighth = at.n // 8
    return at.i < eighth or at.i >= 7 * at.n // 8 or (at.i - eighth) % 3 == 2


def first_four(at: Place) -> bool:
    return at.i < 4


def first_eighth(at: Place) -> bool:
    return at.i < at.n // 8


def first_eighth_with_imatrix(at: Place) -> bool:
    return first_eighth(at) and at.has_imatrix


def first_eighth_without_imatrix(at: Place) -> bool:
    return first_eighth(at) and not at.has_imatrix


def grouped_queries(at: Place) -> bool:
    return at.n_gqa >= 4


class Better(NamedTuple):
    """A dtype, and the places that get it instead of the main one."""

    dtype: DType
    where: Callable[[Place], bool]


@dataclass(frozen=True)
class Mixture:
    """A named recipe before it is made for a model.

    main: the dtype of most tensors. file_type: LLAMA_FTYPE_*. attn_v, ffn_down: where these get another one.
    attn_output: what it gets in a model of eight experts.
    """

    main: DType
    file_type: int
    attn_v: Better | None = None
    ffn_down: Better | None = None
    attn_output: DType | None = None

    def dtype(self, better: Better | None, place: Place) -> DType:
        """`better` where it applies, else the main one."""
        return better.dtype if better and better.where(place) else self.main


Q6_K_MORE, Q5_K_FOUR, Q5_K_EIGHTH = Better(Q6_K, more_bits), Better(Q5_K, first_four), Better(Q5_K, first_eighth)
Q5_K_GROUPED, Q5_K_UNWEIGHTED = Better(Q5_K, grouped_queries), Better(Q5_K, first_eighth_without_imatrix)
MIXTURES = {
    "q4_0": Mixture(Q4_0, 2, ffn_down=Better(Q4_1, first_eighth_with_imatrix)),
    "q4_1": Mixture(Q4_1, 3),
    "q5_0": Mixture(Q5_0, 8, ffn_down=Better(Q5_1, first_eighth_with_imatrix)),
    "q5_1": Mixture(Q5_1, 9),
    "q8_0": Mixture(Q8_0, 7),
    "q4_k_s": Mixture(Q4_K, 14, Q5_K_FOUR, Q5_K_EIGHTH, Q5_K),
    "q4_k_m": Mixture(Q4_K, 15, Q6_K_MORE, Q6_K_MORE, Q5_K),
    "q5_k_s": Mixture(Q5_K, 16),
    "q5_k_m": Mixture(Q5_K, 17, Q6_K_MORE, Q6_K_MORE),
    "q6_k": Mixture(Q6_K, 18),
    "iq4_nl": Mixture(IQ4_NL, 25, Q5_K_GROUPED, Q5_K_UNWEIGHTED, Q5_K),
    "iq4_xs": Mixture(IQ4_XS, 30, Q5_K_GROUPED, Q5_K_UNWEIGHTED, Q5_K),
}
NAMES = tuple(MIXTURES)

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
# Never quantized; tensors of one row are not, either.
KEPT = (Rule(r"_norm\.weight", None), Rule(r"ffn_gate_inp\.weight", None), Rule(r"(?<!weight)$", None))


def recipe_for(
    name: str | os.PathLike[str],
    tensors: Sequence[Shaped],
    metadata: Metadata,
    *,
    has_imatrix: bool = False,
    pure: bool = False,
    output_type: DType | None = None,
    embedding_type: DType | None = None,
    overrides: Sequence[Rule] = (),
) -> Recipe:
    """The recipe that a user asked for: one of NAMES, in any case, made for this model, or the path of a file.

    tensors: the model's, under GGUF names. metadata: its GGUF keys. has_imatrix: whether an imatrix is given.
    pure: all tensors get the named recipe's main dtype. overrides: rules before the recipe's own. output_type: of
    output.weight, or of the embedding where that serves as output. embedding_type: of token_embd.weight. Both of these
    come before `overrides`, as in llama-quantize; an output_type that means the embedding comes after them.

    Raises UsageError for an unknown name, or a rule asked for that decides no tensor; UnsupportedError for a named
    recipe on another architecture; and what `read_recipe` raises.
    """
    has_output = any(tensor.name == OUTPUT for tensor in tensors)
    asked = [Rule(_exactly(EMBEDDING), embedding_type)] if embedding_type else []
    if output_type and has_output:
        asked.append(Rule(_exactly(OUTPUT), output_type))
    asked += overrides
    if output_type and not has_output:
        asked.append(Rule(_exactly(EMBEDDING), output_type))

    mixture = MIXTURES.get(str(name).lower())
    if mixture is None:
        return with_overrides(_from_file(Path(name), pure, tensors), asked, tensors)

    quantizable = [tensor for tensor in tensors if not has_one_row(tensor)]
    kept = [rule for rule in KEPT if any(rule.matches(tensor.name) for tensor in quantizable)]
    check_effect(asked, [*kept, *asked], tensors)
    model = Model.of(metadata, tensors, has_imatrix)
    rules = [*kept, *asked]
    if not pure:
        decided = first_matches(rules, quantizable)
        dtypes = mixed(mixture, [tensor for tensor in quantizable if decided[tensor.name] is None], model)
        rules += grouped(dtypes, mixture.main)
    rules.append(Rule("weight$", mixture.main))
    return Recipe(tuple(rules), str(name).lower(), mixture.file_type, f"Made for a model of {model}.")


def _from_file(path: Path, pure: bool, tensors: Sequence[Shaped]) -> Recipe:
    if not path.exists():
        near = get_close_matches(str(path).lower(), NAMES, n=2)
        raise UsageError(
            f"{str(path)!r} is neither a named recipe nor a file",
            todo=f"Did you mean {' or '.join(near)}?" if near else f"The names are {', '.join(NAMES)}",
        )
    if pure:
        raise UsageError("a recipe file has no main dtype", where="--pure", todo="Name a recipe")
    recipe = read_recipe(path)
    return replace(recipe, idle=tuple(idle_rules(recipe.rules, tensors)))


@dataclass(frozen=True)
class Model:
    """What the choices depend on. n_gqa: query heads per key head. is_tied: the embedding serves as output."""

    n_layers: int
    n_gqa: int
    n_experts: int
    is_70b: bool
    is_tied: bool
    has_imatrix: bool

    @classmethod
    def of(cls, metadata: Metadata, tensors: Iterable[Shaped], has_imatrix: bool) -> Model:
        """Raises UnsupportedError for another architecture than llama."""
        architecture = metadata.get("general.architecture", string("")).data
        if architecture != "llama":
            raise UnsupportedError(
                f"the named recipes are for the architecture 'llama', not for {architecture!r}",
                todo="Write a recipe file",
            )
        n_layers = _number(metadata, "llama.block_count", 0)
        n_heads = _number(metadata, "llama.attention.head_count", 0)
        n_kv_heads = _number(metadata, "llama.attention.head_count_kv", n_heads)
        n_experts = _number(metadata, "llama.expert_count", 0)
        return cls(
            n_layers=n_layers,
            n_gqa=n_heads // n_kv_heads if n_kv_heads else 0,
            n_experts=n_experts,
            is_70b=n_layers == 80 and n_heads != n_kv_heads,
            is_tied=all(tensor.name != OUTPUT for tensor in tensors),
            has_imatrix=has_imatrix,
        )

    def __str__(self) -> str:
        experts = f", {self.n_experts} experts" if self.n_experts else ""
        imatrix = "with" if self.has_imatrix else "without"
        return f"{self.n_layers} layers, query heads in groups of {self.n_gqa}{experts}, {imatrix} an imatrix"


def _number(metadata: Metadata, key: str, default: int) -> int:
    value = metadata.get(key)
    if value is None:
        return default
    if value.kind not in INTEGERS:
        raise FormatError(f"{value.kind} where an integer is required", where=f"key '{key}'")
    return int(value.data)


def mixed(mixture: Mixture, tensors: Iterable[Shaped], model: Model) -> dict[str, DType]:
    """The dtype of each tensor, before rows that do not divide are looked at."""
    dtypes = {}
    i_attn_v = i_ffn_down = 0
    for tensor in sorted(tensors, key=lambda tensor: (_layer(tensor.name), tensor.name)):
        name, dtype = tensor.name, mixture.main
        if name == OUTPUT or (name == EMBEDDING and model.is_tied):
            dtype = Q8_0 if tensor.shape[-1] % Q6_K.block_size or dtype is Q8_0 else Q6_K
        elif "attn_v.weight" in name or "attn_qkv.weight" in name:
            place = Place(i_attn_v, model.n_layers, model.n_gqa, model.has_imatrix)
            dtype = Q8_0 if model.n_experts == 8 else mixture.dtype(mixture.attn_v, place)
            if model.is_70b and dtype is Q4_K:
                dtype = Q5_K  # eight query heads share each of these, so they are small
            i_attn_v += 1
        elif "attn_k.weight" in name:
            dtype = Q8_0 if model.n_experts == 8 else dtype
        elif "attn_output.weight" in name:
            dtype = (mixture.attn_output if model.n_experts == 8 else None) or dtype
        elif "ffn_down" in name:
            i = _layer(name) if model.n_experts > 1 else i_ffn_down
            dtype = mixture.dtype(mixture.ffn_down, Place(i, model.n_layers, model.n_gqa, model.has_imatrix))
            i_ffn_down += 1
        dtypes[name] = dtype
    return dtypes


BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.weight")


def _layer(name: str) -> int:
    block = re.match(r"blk\.(\d+)", name)
    return int(block[1]) if block else -1


def grouped(dtypes: dict[str, DType], main: DType) -> list[Rule]:
    """As few rules as say which tensors get another dtype than `main`: one for each set of layers and dtype."""
    layers: dict[str, dict[DType, list[int]]] = defaultdict(lambda: defaultdict(list))  # kind: dtype: layers
    rules = []
    for name, dtype in dtypes.items():
        if block := BLOCK.fullmatch(name):
            layers[block[2]][dtype].append(int(block[1]))
        elif dtype is not main:
            rules.append(Rule(_exactly(name), dtype))
    some: dict[tuple[str, DType], list[str]] = defaultdict(list)  # (layers, dtype): kinds
    every: dict[DType, list[str]] = defaultdict(list)  # dtype: kinds
    for kind, by_dtype in layers.items():
        most = main if main in by_dtype else max(by_dtype, key=lambda dtype: len(by_dtype[dtype]))
        if most is not main:
            every[most].append(kind)
        for dtype, numbers in by_dtype.items():
            if dtype is not most:
                some[_any(map(str, numbers)), dtype].append(kind)
    rules += [Rule(rf"^blk\.{numbers}\.{_any(kinds)}\.weight$", dtype) for (numbers, dtype), kinds in some.items()]
    rules += [Rule(rf"^blk\.\d+\.{_any(kinds)}\.weight$", dtype) for dtype, kinds in every.items()]
    return rules


def _any(texts: Iterable[str]) -> str:
    escaped = [re.escape(text) for text in texts]
    return f"({'|'.join(escaped)})" if len(escaped) > 1 else escaped[0]


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"
