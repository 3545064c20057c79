"""Named recipes against llama-quantize's answers (llama_quantize_types.py says how they were got), and their errors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import llama_quantize_types as llama_quantize
import pytest
from llama_quantize_types import MODELS, Model

from llamatools.dtypes import BY_ID, TABLE, DType, named
from llamatools.errors import FormatError, UnsupportedError, UsageError
from llamatools.metadata import Metadata, string, u32
from llamatools.mixtures import NAMES, recipe_for
from llamatools.recipes import Recipe, Rule, choose, parse_rule, read_recipe


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: DType
    shape: tuple[int, ...]


def tensors_of(model: Model) -> list[Tensor]:
    return [Tensor(str(t.name), BY_ID[t.type], t.ne[::-1]) for t in model.tensors()]


def metadata_of(model: Model) -> Metadata:
    return {"general.architecture": string("llama")} | {key: u32(n) for key, n in model.keys().items()}


def make(model: Model, name: str, *, has_imatrix: bool = False, options: Sequence[str] = ()) -> Recipe:
    """The recipe under llama-quantize's options."""
    dtypes: dict[str, DType] = {}
    overrides: list[Rule] = []
    words = iter(options)
    for option in words:
        if option == "--tensor-type":
            overrides.append(parse_rule(next(words)))
        elif option != "--pure":
            dtypes[option] = named(next(words))
    return recipe_for(
        name,
        tensors_of(model),
        metadata_of(model),
        has_imatrix=has_imatrix,
        pure="--pure" in options,
        output_type=dtypes.get("--output-tensor-type"),
        embedding_type=dtypes.get("--token-embedding-type"),
        overrides=overrides,
    )


ANSWERS = llama_quantize.ANSWERS.read_text().splitlines()


def test_there_is_an_answer_for_every_case() -> None:
    asked = {" ".join([model, *options.split(), recipe]) for model, options, recipe in llama_quantize.cases()}
    answered = [line.partition(": ")[0].removesuffix(" [--imatrix]").removesuffix(" --imatrix") for line in ANSWERS]
    assert set(answered) == asked
    assert set(llama_quantize.RECIPES) == set(NAMES)


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_gets_the_dtype_that_llama_quantize_gives_it(model: str) -> None:
    tensors = tensors_of(MODELS[model])
    for line in ANSWERS:
        case, _, expected = line.partition(": ")
        name, *options = case.split()
        if name != model:
            continue
        weighted = {"--imatrix": [True], "[--imatrix]": [False, True]}.get(options[-1], [False])
        if "--imatrix" in options[-1]:
            options.pop()
        for has_imatrix in weighted:
            recipe = make(MODELS[model], options[-1], has_imatrix=has_imatrix, options=options[:-1])
            choices = choose(recipe, tensors)
            found = {t.name: str(choices[t.name].dtype) for t in tensors if len(t.shape) > 1}
            assert llama_quantize.summary(found) == expected, case
            assert all(choices[t.name].dtype is t.dtype for t in tensors if len(t.shape) == 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_named_recipe_is_short_and_reads_back(name: str, tmp_path: Path) -> None:
    for model in ("smollm2-135m", "llama-3-8b", "mixtral-8x7b"):
        recipe = make(MODELS[model], name)
        path = tmp_path / model
        path.write_text(recipe.text())
        assert len(recipe.text().splitlines()) <= 12
        assert read_recipe(path) == recipe


def test_text_of_a_named_recipe() -> None:
    assert make(MODELS["smollm2-135m"], "Q4_K_S").text() == (
        "# q4_k_s\n"
        "# Made for a model of 30 layers, query heads in groups of 3, without an imatrix.\n"
        "# The first rule whose pattern is found in a tensor's name gives its dtype; `keep` leaves it as it is.\n"
        "^token_embd\\.weight$ = Q8_0\n"
        "^blk\\.(0|1|2|3)\\.attn_v\\.weight$ = Q5_K\n"
        "^blk\\.(0|1|2)\\.ffn_down\\.weight$ = Q5_K\n"
        "weight$ = Q4_K\n"
    )
    mixtral = make(MODELS["mixtral-8x7b"], "q6_k", has_imatrix=True)
    assert mixtral.comment == "Made for a model of 32 layers, query heads in groups of 4, 8 experts, with an imatrix."
    assert mixtral.rules[0] == Rule(r"ffn_gate_inp\.weight", None)


DOCUMENTED = (Path(__file__).parents[1] / "docs" / "reference" / "recipes.md").read_text()
LLAMA_3_8B = Model(32, 32, 8, 4096, 14336, 128, 128256)


def test_documented_bits_per_weight() -> None:
    """And that they are those of llama-quantize: its help gives the sizes, in GiB."""
    published = {"q4_0": 4.34, "q4_1": 4.78, "q5_0": 5.21, "q5_1": 5.65, "q4_k_s": 4.37, "q4_k_m": 4.58,
                 "q5_k_s": 5.21, "q5_k_m": 5.33, "q6_k": 6.14, "q8_0": 7.96}  # fmt: skip
    tensors = tensors_of(LLAMA_3_8B)
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in tensors}
    bits = {}
    for name in NAMES:
        choices = choose(make(LLAMA_3_8B, name), tensors)
        bits[name] = sum(choices[tensor].dtype.bits_per_weight * n for tensor, n in sizes.items())
        if name in published:
            assert bits[name] / 8 / 2**30 == pytest.approx(published[name], abs=0.015)
    documented = dict(re.findall(r"^\| `(\w+)` \| (\d\.\d\d) \|", DOCUMENTED, re.M))
    assert documented == {name: f"{n / sum(sizes.values()):.2f}" for name, n in bits.items()}


def test_documented_dtypes_are_those_that_can_be_written() -> None:
    sentence = re.search(r"^- DTYPE is (.*?), in any case", DOCUMENTED, re.M | re.S)
    assert sentence is not None
    assert set(re.findall(r"\w*\d\w*", sentence[1])) == {dtype.name for dtype in TABLE if dtype.encode}


def test_the_documented_recipe_is_what_is_printed() -> None:
    assert DOCUMENTED.split("```")[1].lstrip() == make(LLAMA_3_8B, "q4_k_m").text()


def test_as_many_key_heads_as_query_heads_where_the_file_does_not_say() -> None:
    """llama.cpp's default; with four query heads to a key head, attn_v would be Q5_K."""
    model = MODELS["llama-3-8b"]
    metadata = {key: value for key, value in metadata_of(model).items() if key != "llama.attention.head_count_kv"}
    recipe = recipe_for("iq4_nl", tensors_of(model), metadata, has_imatrix=True)
    assert [str(rule) for rule in recipe.rules] == [r"^output\.weight$ = Q6_K", "weight$ = IQ4_NL"]


@pytest.mark.parametrize("name", NAMES)
def test_file_type_is_llamacpp_s_of_that_name(name: str) -> None:
    assert make(MODELS["tiny-llama"], name).file_type == gguf.LlamaFileType[f"MOSTLY_{name.upper()}"]


def test_norms_and_biases_of_several_rows_are_kept() -> None:
    """As llama-quantize keeps them; no LLaMA has such."""
    model = MODELS["tiny-llama"]
    odd = [Tensor(name, BY_ID[1], (4, 256)) for name in ("blk.0.attn_norm.weight", "blk.0.attn_q.bias")]
    tensors = [*tensors_of(model), *odd]
    recipe = recipe_for("q4_0", tensors, metadata_of(model))
    choices = choose(recipe, tensors)
    assert [choices[tensor.name].dtype for tensor in odd] == [BY_ID[1], BY_ID[1]]
    assert [str(rule) for rule in recipe.rules] == [
        r"_norm\.weight = keep", "(?<!weight)$ = keep", r"^output\.weight$ = Q6_K", "weight$ = Q4_0",
    ]  # fmt: skip


def test_output_type_means_the_embedding_where_that_serves_as_output() -> None:
    """With --pure, too, where llama-quantize passes over its --output-tensor-type."""
    tied = MODELS["smollm2-135m"]
    recipe = make(tied, "q4_0", options=["--pure", "--output-tensor-type", "Q8_0"])
    assert [str(rule) for rule in recipe.rules] == [r"^token_embd\.weight$ = Q8_0", "weight$ = Q4_0"]
    with pytest.raises(UsageError, match=r"^rule '\^token_embd\\.weight\$ = Q8_0': the tensors that it matches"):
        make(tied, "q4_0", options=["--token-embedding-type", "Q6_K", "--output-tensor-type", "Q8_0"])


def test_an_override_that_decides_nothing() -> None:
    mixtral = MODELS["mixtral-8x7b"]
    with pytest.raises(UsageError, match=r"^rule 'attn_w = Q8_0': no tensor's name matches it"):
        make(mixtral, "q4_0", options=["--tensor-type", "attn_w=Q8_0"])
    with pytest.raises(UsageError, match=r"^rule 'gate_inp = Q8_0': the tensors that it matches"):
        make(mixtral, "q4_0", options=["--tensor-type", "gate_inp=Q8_0"])
    with pytest.raises(UsageError, match=r"^rule '\^output = Q8_0': the tensors that it matches"):
        make(mixtral, "q4_0", options=["--output-tensor-type", "F16", "--tensor-type", "^output=Q8_0"])


def test_a_file_s_recipe_takes_the_same_options(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("weight = Q4_0\n")
    tied, untied = MODELS["smollm2-135m"], MODELS["llama-3-8b"]
    options = ["--output-tensor-type", "Q8_0", "--tensor-type", "ffn_gate=keep"]
    assert [str(rule) for rule in make(untied, str(path), options=options).rules] == [
        r"^output\.weight$ = Q8_0", "ffn_gate = keep", "weight = Q4_0",
    ]  # fmt: skip
    made = make(tied, str(path), options=options)
    assert [str(rule) for rule in made.rules] == ["ffn_gate = keep", r"^token_embd\.weight$ = Q8_0", "weight = Q4_0"]
    assert (made.name, made.file_type) == ("mine.txt", None)
    with pytest.raises(UsageError) as refused:
        make(untied, str(path), options=["--pure"])
    assert str(refused.value) == "--pure: a recipe file has no main dtype. Name a recipe"
    with pytest.raises(UsageError, match="no tensor's name matches it"):
        make(untied, str(path), options=["--tensor-type", "attn_w=Q8_0"])


@pytest.mark.parametrize(
    ("name", "todo"),
    [
        ("q4_k_l", "Did you mean q4_k_s or q4_k_m?"),
        ("Q6K", "Did you mean q6_k?"),
        ("model.gguf", f"The names are {', '.join(NAMES)}"),
    ],
)
def test_an_unknown_recipe(name: str, todo: str) -> None:
    with pytest.raises(UsageError) as refused:
        make(MODELS["tiny-llama"], name)
    assert str(refused.value) == f"'{name}' is neither a named recipe nor a file. {todo}"


def test_models_that_named_recipes_are_not_for() -> None:
    model = MODELS["tiny-llama"]
    falcon = {**metadata_of(model), "general.architecture": string("falcon")}
    with pytest.raises(UnsupportedError) as refused:
        recipe_for("q4_0", tensors_of(model), falcon)
    assert str(refused.value) == (
        "the named recipes are for the architecture 'llama', not for 'falcon'. Write a recipe file"
    )
    with pytest.raises(FormatError) as malformed:
        recipe_for("q4_0", tensors_of(model), {**metadata_of(model), "llama.expert_count": string("8")})
    assert str(malformed.value) == "key 'llama.expert_count': string where an integer is required"
