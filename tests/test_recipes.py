"""Recipes: rules and their text, and what they give a tensor. The named ones are in test_mixtures.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamatools.dtypes import BF16, BY_NAME, F16, F32, DType, named
from llamatools.errors import FormatError, LlamatoolsError, UnsupportedError, UsageError
from llamatools.recipes import (
    FILE_TYPES,
    Recipe,
    Rule,
    choose,
    file_type,
    idle_rules,
    parse_rule,
    read_recipe,
    with_overrides,
    writable,
)

Q4_0, Q5_0, Q8_0, Q4_K, Q6_K = map(named, ("Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q6_K"))


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...] = (4, 256)
    dtype: DType = F16


def recipe(*lines: str) -> Recipe:
    return Recipe(tuple(map(parse_rule, lines)), "mine")


def test_text_has_a_rule_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xef\xbb\xbf# heading = Q4_0\r\n\r\n  a=b\\.  =  q6_k  # why = not\r\n#\r\nC # d=Keep\n.=bf16")
    expected = (Rule("a=b\\.", Q6_K), Rule("C # d", None), Rule(".", BF16))
    assert read_recipe(path) == Recipe(expected)
    assert read_recipe(path).name == "mine.txt"
    assert [str(rule) for rule in expected] == ["a=b\\. = Q6_K", "C # d = keep", ". = BF16"]


def test_a_heading_cannot_become_a_rule(tmp_path: Path) -> None:
    mine = Recipe((Rule(".", Q4_0),), name="a\n. = F32", comment="b\n. = F16")
    path = tmp_path / "recipe"
    path.write_text(mine.text())
    assert read_recipe(path) == mine


@example("#", "Q4_0")
@example("a = Q4_0 #", "keep")
@example("a=b#\n", "Q4_0")
@settings(deadline=None)
@given(
    st.text(st.sampled_from("a# =.\t\r\n\\wQ4_0"), min_size=1) | st.text(min_size=1),
    st.sampled_from(["Q4_0", "keep", "f32 # a = b"]),
)
def test_what_is_taken_as_a_rule_is_printed_so_that_it_reads_back(
    tmp_path_factory: pytest.TempPathFactory, pattern: str, dtype: str
) -> None:
    try:
        rule = parse_rule(f"{pattern} = {dtype}")
        text = Recipe((rule,)).text().encode()
    except (UsageError, UnicodeEncodeError):
        return
    path = tmp_path_factory.getbasetemp() / "recipe"
    path.write_bytes(text)
    assert read_recipe(path) == Recipe((rule,))


BAD_RULES = {
    "Q4_0": "'Q4_0' is no rule. A rule is PATTERN = DTYPE",
    "= Q4_0": "'= Q4_0' is no rule. A rule is PATTERN = DTYPE",
    "attn_v = Q4_0 Q5_0": "'attn_v = Q4_0 Q5_0' is no rule. A rule is PATTERN = DTYPE",
    "attn_(v = Q4_0": "'attn_(v' is no regular expression: missing ), unterminated subpattern at position 5",
    "a{99999999999} = Q4_0": "'a{99999999999}' is no regular expression: the repetition number is too large",
    "attn_v = Q4_KM": "unknown dtype 'Q4_KM'. Did you mean Q4_K?",
    "attn_v = IQ2_XS": "llamatools cannot write IQ2_XS weights",
    "attn_v = Q2_K": "llamatools cannot write Q2_K weights",
    "attn_v = I32": "llamatools cannot write I32 weights",
}


@pytest.mark.parametrize("line", BAD_RULES)
def test_what_is_no_rule_is_refused_with_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "recipe"
    path.write_text(f"# mine\n\n{line}\n. = Q4_0\n")
    with pytest.raises(LlamatoolsError) as refused:
        read_recipe(path)
    assert str(refused.value) == f"{path}: line 3: {BAD_RULES[line]}"
    assert isinstance(refused.value, UnsupportedError if "cannot write" in BAD_RULES[line] else UsageError)
    with pytest.raises(LlamatoolsError) as refused:
        parse_rule(line, "--tensor-type")
    assert str(refused.value) == f"--tensor-type: {BAD_RULES[line]}"


def test_a_pattern_too_deep_to_compile() -> None:
    with pytest.raises(UsageError, match="is no regular expression: "):
        parse_rule("(" * 10_000 + " = Q4_0")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"# a = Q4_0\n", UsageError, "no rule in it. A rule is PATTERN = DTYPE"),
        (b"a = Q4_0\n\xff\n", FormatError, "byte 9 is not UTF-8 text, as a recipe must be"),
        (b"\n" * (1 << 20) + b"a = Q4_0", FormatError, "more than 1048576 bytes, too long for a recipe"),
        (None, FormatError, "no such file or directory"),
    ],
)
def test_files_that_hold_no_recipe(
    tmp_path: Path, data: bytes | None, error: type[LlamatoolsError], message: str
) -> None:
    path = tmp_path / "recipe"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(error) as refused:
        read_recipe(path)
    assert str(refused.value) == f"{path}: {message}"


def test_a_dtype_asked_for_by_an_option() -> None:
    assert writable("q4_0") is Q4_0
    with pytest.raises(UsageError, match=r"^--output-type: unknown dtype 'q4'. Did you mean Q4_"):
        writable("q4", "--output-type")


def test_the_first_rule_found_in_the_name_decides() -> None:
    choices = choose(
        recipe("attn_V = F32", "attn_v = keep", "^attn = F32", r"\.weight$ = Q4_0", "attn = Q6_K"),
        [Tensor("blk.0.attn_v.weight", dtype=BF16), Tensor("blk.0.attn_q.weight"), Tensor("blk.0.attn_q.sums")],
    )
    assert [choice.dtype for choice in choices.values()] == [BF16, Q4_0, Q6_K]
    assert [str(choice.rule) for choice in choices.values()] == ["attn_v = keep", r"\.weight$ = Q4_0", "attn = Q6_K"]
    assert not any(choice.is_substitute for choice in choices.values())


@pytest.mark.parametrize("shape", [(), (1,), (256,), (1, 256), (1, 1, 256)])
def test_tensors_of_one_row_keep_their_dtype(shape: tuple[int, ...]) -> None:
    choice = choose(recipe(". = Q4_0"), [Tensor("a", shape, F32)])["a"]
    assert (choice.dtype, choice.wanted, choice.rule) == (F32, F32, None)
    assert choose(recipe("b = Q4_0"), [Tensor("a", shape, F32)])["a"] == choice


def test_a_tensor_without_a_rule_is_an_error() -> None:
    with pytest.raises(UsageError) as refused:
        choose(recipe("b = Q4_0"), [Tensor("b"), Tensor("a")])
    assert str(refused.value) == "tensor 'a': no rule of the recipe mine matches it. Add one; `. = keep` keeps all"


def test_rows_that_do_not_divide_are_told_and_refused_when_strict() -> None:
    tensors = [Tensor("a"), Tensor("b", (4, 320)), Tensor("c", (4, 100))]
    choices = choose(recipe(". = Q4_K"), tensors)
    assert {name: (choice.dtype, choice.wanted, choice.row_length) for name, choice in choices.items()} == {
        "a": (Q4_K, Q4_K, 256), "b": (Q5_0, Q4_K, 320), "c": (F16, Q4_K, 100),
    }  # fmt: skip
    assert [choice.is_substitute for choice in choices.values()] == [False, True, True]
    assert choices["b"].reason == "rows of 320 weights do not divide into Q4_K blocks of 256"
    assert choose(recipe(". = Q4_K"), tensors[:1], strict=True)["a"].dtype is Q4_K
    with pytest.raises(UsageError) as refused:
        choose(recipe(". = Q4_0"), [Tensor("layers.0.attention.wo.weight", (4, 100))], strict=True)
    assert str(refused.value) == (
        "tensor 'layers.0.attention.wo.weight': rows of 100 weights do not divide into Q4_0 blocks of 32. "
        "Add a rule giving it F16"
    )


def test_overrides_come_before_the_rules_and_must_decide_something() -> None:
    tensors = [Tensor("a"), Tensor("b"), Tensor("a_norm", (256,))]
    own = Recipe((Rule(".", Q4_0),), "mine", 2, "own")
    more = with_overrides(own, [Rule("b", Q8_0)], tensors)
    assert more.text() == "# mine\n# own\n" + own.text().splitlines(keepends=True)[2] + "b = Q8_0\n. = Q4_0\n"
    assert more.file_type == 2
    assert [choice.dtype for choice in choose(more, tensors).values()] == [Q4_0, Q8_0, F16]
    for pattern, message in {
        "A": "no tensor's name matches it",
        "_norm": "the tensors that it matches have one row or are decided by a rule before it",
    }.items():
        with pytest.raises(UsageError) as refused:
            with_overrides(own, [Rule(pattern, Q8_0)], tensors)
        assert str(refused.value) == f"rule '{pattern} = Q8_0': {message}. `llamatools inspect` lists the names"
    with pytest.raises(UsageError, match=r"^rule 'a = Q6_K': the tensors that it matches have one row or are decided"):
        with_overrides(own, [Rule("^a$", Q8_0), Rule("a", Q6_K)], tensors)


def test_idle_rules() -> None:
    mine = recipe("a = Q4_0", "c = Q4_0", ". = Q4_0", "b = Q4_0", "a = Q4_0")
    assert [str(rule) for rule in idle_rules(mine.rules, [Tensor("a"), Tensor("b")])] == [
        "c = Q4_0", "b = Q4_0", "a = Q4_0",
    ]  # fmt: skip


def test_file_types_are_llamacpp_s() -> None:
    """By gguf-py's enumeration. Where llama.cpp has several sizes of a type, it guesses the medium one."""
    medium = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M",
              "MXFP4": "MOSTLY_MXFP4_MOE"}  # fmt: skip
    known = {name: number for name, number in FILE_TYPES.items() if name != "Q2_0"}  # is newer than this gguf-py
    assert known == {name: gguf.LlamaFileType[medium.get(name, f"MOSTLY_{name}")] for name in known}
    assert set(FILE_TYPES) <= set(BY_NAME)


def test_a_file_s_recipe_is_labelled_by_its_commonest_dtype() -> None:
    assert file_type(Recipe((), "mine"), {F32: 10, Q6_K: 100, Q4_0: 50}) == gguf.LlamaFileType.MOSTLY_Q6_K
    assert file_type(Recipe((), "q4_k_s", 14), {Q6_K: 100}) == 14
    with pytest.raises(
        UnsupportedError, match=r"^most weights are I8, and no model file of llama.cpp is of that type$"
    ):
        file_type(Recipe((), "mine"), {BY_NAME["I8"]: 1})
