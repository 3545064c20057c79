"""Imports run one way, heavy packages are imported where they are needed only, and nothing can run what a file says."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom to the top; a module may import from its own row and the rows before it.
ORDER = (
    ("version", "errors"),
    ("dtypes",),
    ("metadata", "strided", "tensors"),
    ("checkpoint", "layout"),
    ("names",),
    ("tokenizers", "formats"),
    ("recipes",),
    ("mixtures", "importance"),
    ("provenance", "draft"),
    ("plan", "fill", "recognise"),
    ("quantization",),
    ("check",),
    ("rewriting",),
    ("conversion", "views"),
    ("reports", "overview", "sameness", "strip", "memory_views"),
    ("page",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
OF_RUN = ("run_command.py", "chat.py")  # what the command `run` is made of
RANK = {module: rank for rank, row in enumerate(ORDER) for module in row}
HEAVY = {"torch", "numba", "sentencepiece", "tokenizers", "safetensors", "typer", "rich", "tqdm", "transformers"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, absolute, and whether at the top of the file."""
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                is_module = (ROOT / Path(*module.split("."), f"{alias.name}.py")).exists()
                yield f"{module}.{alias.name}" if is_module or not node.module else module, id(node) in top


SOURCES = sorted((ROOT / "llamatools").rglob("*.py"))


def house(name: str) -> str | None:
    parts = name.split(".")
    return (parts[1] if len(parts) > 1 else "__init__") if parts[0] == "llamatools" else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(ROOT / "llamatools").parts[0].removesuffix(".py")
    for name, _ in imports(path):
        other = house(name)
        if other:
            assert RANK[other] <= RANK[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_stay_where_they_belong(path: Path) -> None:
    for name, at_top in imports(path):
        package = name.split(".")[0]
        assert package != "torch"
        assert package != "llamatools_runtime" or (path.name in OF_RUN and not at_top)
        if package == "typer":
            assert path.parent.name == "cli"
        elif package == "numba":
            assert not at_top or "kernels" in path.parts or "simd" in path.parts
        elif package in HEAVY:
            assert not at_top


def test_torch_is_imported_by_the_oracle_only() -> None:
    users = {
        path.name
        for path in (ROOT / "runtime").rglob("*.py")
        for name, _ in imports(path)
        if name.split(".")[0] == "torch"
    }
    assert users == {"oracle.py"}


@pytest.mark.parametrize(
    "path", sorted([*SOURCES, *(ROOT / "runtime").rglob("*.py")]), ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_can_execute_what_a_file_says(path: Path) -> None:
    assert not {name.split(".")[0] for name, _ in imports(path)} & {"pickle", "marshal", "shelve", "jinja2", "yaml"}
    calls = {node.func.id for node in ast.walk(ast.parse(path.read_text())) if _is_named_call(node)}  # type: ignore[attr-defined]
    assert not calls & {"eval", "exec", "compile", "__import__"}


def _is_named_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


BLOCKED = """
import sys
for name in ("torch", "numba", "sentencepiece", "tokenizers", "safetensors", "transformers"):
    sys.modules[name] = None
import llamatools
source, destination = sys.argv[1:]
llamatools.convert(source, destination, options=llamatools.MetaOptions(overrides=llamatools.Overrides(context=64)))
print(llamatools.inspect(source).n_weights, llamatools.inspect(destination).n_weights)
"""


def test_inspect_and_convert_without_torch_and_the_like(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(ROOT / "fixtures" / "tiny-llama"), str(tmp_path / "tiny.gguf")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny.gguf").exists()


def test_module_names_do_not_hide_standard_ones() -> None:
    names = {path.stem for path in SOURCES if path.stem not in ("__init__", "__main__")}
    assert not names & set(sys.stdlib_module_names)


def test_a_name_that_is_not_public() -> None:
    import llamatools

    with pytest.raises(AttributeError, match="^module 'llamatools' has no attribute 'frobnicate'$"):
        _ = llamatools.frobnicate
