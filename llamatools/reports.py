"""What quantizing did, for people and for programs. Everything from a file is escaped before it is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .conversion import Conversion
from .draft import Draft, check_destination
from .dtypes import DType
from .errors import UsageError, in_file, printable
from .quantization import Change
from .views import Table, human_bytes

SCHEMA = "llamatools.quantize/1"
BEGINNING = f'{{\n  "schema": "{SCHEMA}"'.encode()  # of a report's file
SHOWN_NAMES = 3


def table(changes: Sequence[Change]) -> Table:
    """A row for the tensors that have a name but for the layer's number, and became the same dtype."""
    groups: dict[tuple[str, DType, DType], list[Change]] = {}
    for change in changes:
        groups.setdefault((_in_any_layer(change.name), change.before, change.after), []).append(change)
    rows: list[tuple[str, ...]] = []
    names = list(dict.fromkeys(name for name, _, _ in groups))
    for (name, before, after), group in sorted(groups.items(), key=lambda item: names.index(item[0][0])):
        dtypes = f"{before} > {after}" if before.is_quantized and before is not after else after.name
        size = sum(change.nbytes for change in group)
        error = relative_rmse(group)
        worst = worst_block(group)
        rows.append(
            (
                printable(name),
                str(len(group)),
                dtypes,
                human_bytes(size),
                "" if error is None else f"{error:.2%}",
                "" if worst is None else f"{worst[0]:.1%}",
                "" if worst is None else _place(worst[1], in_layers="*" in name),
            )
        )
    headings = ("tensors", "", "dtype", "size", "error", "worst", "block")
    return Table(headings, rows, frozenset({1, 3, 4, 5}))


def lines(done: Conversion) -> Iterator[str]:
    """What there is to know besides the table: what the recipe did not get, and the totals."""
    changes = done.changes
    for change in changes:
        if change.after is not change.wanted:
            yield printable(
                f"fallback  {change.name}: {change.after}, since rows of {change.shape[-1]} weights do not divide into "
                f"{change.wanted} blocks of {change.wanted.block_size}"
            )
    unweighted = [change.name for change in changes if change.weighted is False]
    if unweighted:
        yield f"imatrix   has no entry for {_listed(unweighted)}"
    if done.recipe:
        for rule in done.recipe.idle:
            yield printable(f"idle      rule '{rule}' of {done.recipe.name} decides no tensor")
    requantized = [change for change in changes if change.is_requantized]
    if requantized:
        dtypes = ", ".join(sorted({change.before.name for change in requantized}))
        yield (
            f"requantized {len(requantized)} tensors of {dtypes}: what those had lost already is lost for good, and "
            "not in the errors shown"
        )
    yield f"tensors   {totals(changes)}"


def totals(changes: Sequence[Change]) -> str:
    """All tensors together, in a line."""
    before, after = sum(c.nbytes_before for c in changes), sum(c.nbytes for c in changes)
    n_weights = sum(change.n_weights for change in changes)
    error = relative_rmse(changes)
    return (
        f"{human_bytes(before)} > {human_bytes(after)}, {_bits(before, n_weights):.2f} > "
        f"{_bits(after, n_weights):.2f} bits per weight{'' if error is None else f', error {error:.2%}'}"
    )


def as_json(done: Conversion) -> dict[str, Any]:
    """The report, in a schema that only grows. Errors are relative: 0.07 is 7 %; null where not measured."""
    changes, recipe = done.changes, done.recipe
    n_weights = sum(change.n_weights for change in changes)
    before, after = sum(c.nbytes_before for c in changes), sum(c.nbytes for c in changes)
    return {
        "schema": SCHEMA,
        "written": done.written,
        "nbytes": done.layout.size,
        "total": {
            "n_weights": n_weights,
            "nbytes_before": before,
            "nbytes": after,
            "bits_per_weight_before": _bits(before, n_weights),
            "bits_per_weight": _bits(after, n_weights),
            "relative_rmse": relative_rmse(changes),
        },
        "recipe": None if recipe is None else [printable(str(rule)) for rule in recipe.rules],
        "idle_rules": [printable(str(rule)) for rule in recipe.idle] if recipe else [],
        "tensors": [_tensor_json(change) for change in changes],
    }


def check_report(path: Path, model: Path) -> None:
    """Refuses a place for the report of `model` where anything but an earlier report is. Raises UsageError."""
    check_destination(path, (), force=True)
    with in_file(path):
        if path.resolve() == model.resolve():
            raise UsageError("is both the model and its report", todo="Name another file for the report")
        if path.exists() and not _is_report(path):
            raise UsageError("is there already and is no report of an earlier run", todo="Name another file")


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(BEGINNING)) == BEGINNING


def write_report(done: Conversion, path: Path) -> None:
    """Writes the report as a JSON file, which appears when it is whole. Raises as `check_report` and `Draft`."""
    check_report(path, done.layout.files[0].path)
    data = (json.dumps(as_json(done), indent=2) + "\n").encode()
    with Draft(path, len(data), force=True) as draft:
        draft.write(data, 0)
        draft.publish()


def _tensor_json(change: Change) -> dict[str, Any]:
    rounding = change.rounding
    return {
        "name": printable(change.name),
        "shape": list(change.shape),
        "dtype_before": change.before.name,
        "dtype": change.after.name,
        "dtype_wanted": change.wanted.name,
        "nbytes_before": change.nbytes_before,
        "nbytes": change.nbytes,
        "bits_per_weight": change.after.bits_per_weight,
        "weighted": change.weighted,
        "relative_rmse": None if rounding is None else rounding.relative_rmse,
        "worst_block": None
        if rounding is None
        else {"error": rounding.worst_block, "row": rounding.worst_at[0], "column": rounding.worst_at[1]},
    }


def relative_rmse(changes: Iterable[Change]) -> float | None:
    """Of all quantized weights together; None where none were measured."""
    roundings = [change.rounding for change in changes if change.rounding]
    squares = sum(rounding.squares for rounding in roundings)
    if not roundings:
        return None
    return float((sum(rounding.errors for rounding in roundings) / squares) ** 0.5) if squares else 0.0


def worst_block(changes: Iterable[Change]) -> tuple[float, Change] | None:
    """The largest error of a block over its tensor's root mean square, and whose it is."""
    measured = [(change.rounding.worst_block, change) for change in changes if change.rounding]
    return max(measured, key=lambda pair: pair[0], default=None)


def _place(change: Change, in_layers: bool) -> str:
    assert change.rounding is not None, "it was measured"
    row, _ = change.rounding.worst_at
    layer = re.search(r"\d+", change.name)
    return f"{f'layer {layer[0]} ' if in_layers and layer else ''}row {row}"


def _in_any_layer(name: str) -> str:
    return re.sub(r"^blk\.\d+\.", "blk.*.", name).removesuffix(".weight")


def _bits(nbytes: int, n_weights: int) -> float:
    return 8 * nbytes / n_weights if n_weights else 0.0


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(printable, names[:SHOWN_NAMES]))
    return shown if len(names) <= SHOWN_NAMES else f"{shown} and {len(names) - SHOWN_NAMES} more"
