"""Recipes: their text, their errors, and the named ones against llama-quantize's answers."""

from __future__ import annotations

from pathlib import Path

from llamatools.recipes import Recipe, parse_rule, read_recipe


def test_a_printed_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = Recipe((parse_rule(r"^blk\.(0|1)\.ffn_down = Q6_K"), parse_rule("a=b = q8_0 # why"), parse_rule(".=keep")))
    path = tmp_path / "mine.txt"
    path.write_text(recipe.text())
    assert read_recipe(path) == recipe
    assert [rule.pattern for rule in recipe.rules] == [r"^blk\.(0|1)\.ffn_down", "a=b", "."]
