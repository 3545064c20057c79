"""How `inspect --hash`, `--diff` and `--against` show what they found: a table, lines below it, JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .check import Finding, difference, hashing, proof
from .errors import printable
from .views import Table, finding_json, matches

OnProgress = Callable[[int, int], object]
SCHEMAS = {name: f"llamatools.{name}/1" for name in ("hash", "diff", "against")}


@dataclass(frozen=True)
class Shown:
    """table and lines: for people. facts: the same as JSON. sound: whether nothing was found wrong or different."""

    table: Table | None
    lines: Sequence[str]
    facts: dict[str, Any]
    sound: bool


def digests(path: Path, match: str | None, threads: int | None, on_progress: OnProgress) -> Shown:
    """--hash: a row per tensor."""
    found = hashing.digests(path, threads=threads, on_progress=on_progress)
    tensors = [tensor for tensor in found.tensors if matches(match, tensor.name)]
    table = Table(
        ("sha256", "dtype", "shape", "tensor"),
        [(t.sha256, t.dtype, t.shape, printable(t.name)) for t in tensors],
    )
    lines = [f"{found.metadata or 'none':64}  metadata", f"{found.weights}  weights"]
    if found.checked:
        lines.append(f"{found.checked} of {len(found.tensors)} tensors have the digest that is stored in the file")
    facts = {
        "schema": SCHEMAS["hash"],
        "path": printable(found.path),
        "weights": found.weights,
        "metadata": found.metadata,
        "checked": found.checked,
        "tensors": [asdict(t) | {"name": printable(t.name)} for t in tensors],
        "findings": [finding_json(finding) for finding in found.findings],
    }
    sound = not any(finding.severity == "error" for finding in found.findings)
    return Shown(table, lines + _finding_lines(found.findings), facts, sound)


def undigested(path: Path, findings: Sequence[Finding]) -> Shown:
    """--hash for a file that cannot be read whole: what is wrong with it, and no digest."""
    facts = {
        "schema": SCHEMAS["hash"],
        "path": printable(str(path)),
        "weights": None,
        "metadata": None,
        "checked": 0,
        "tensors": [],
        "findings": [finding_json(finding) for finding in findings],
    }
    lines = [f"{printable(str(path))}: not hashed, since it is not whole", *_finding_lines(findings)]
    return Shown(None, lines, facts, sound=False)


def diff(a: Path, b: Path, match: str | None, threads: int | None, on_progress: OnProgress) -> Shown:
    """--diff: a row per tensor that is not the same byte for byte, the worst first."""
    found = difference.diff(a, b, threads=threads, on_progress=on_progress)
    tensors = [tensor for tensor in found.tensors if matches(match, tensor.name)]
    table = Table(
        ("tensor", "verdict", "relative RMSE", "what"),
        [
            (printable(t.name), t.verdict, "" if t.error is None else f"{t.error:.3g}", printable(t.how))
            for t in tensors
            if t.verdict != "same bytes"
        ],
        right=frozenset({2}),
    )
    n = Counter(tensor.verdict for tensor in found.tensors)
    lines = [f"{what}: {x} in A, {y} in B" for what, x, y in found.fields]
    lines += [f"not compared: {printable(what)}" for what in found.not_compared]
    lines.append(f"{len(found.tensors)} tensors: " + ", ".join(f"{count} {verdict}" for verdict, count in n.items()))
    lines.append("the same model" if found.same else "not the same")
    facts = {
        "schema": SCHEMAS["diff"],
        "a": printable(found.a),
        "b": printable(found.b),
        "same": found.same,
        "tensors": [asdict(t) | {"name": printable(t.name), "error": _number(t.error)} for t in tensors],
        "fields": [{"what": what, "a": x, "b": y} for what, x, y in found.fields],
        "not_compared": [printable(what) for what in found.not_compared],
    }
    return Shown(table, lines, facts, found.same)


def prove(
    dest: Path, source: Path, imatrix: Path | None, match: str | None, threads: int | None, on_progress: OnProgress
) -> Shown:
    """--against: a row per way in which tensors were made of the source's."""
    found = proof.prove(dest, source, imatrix=imatrix, threads=threads, on_progress=on_progress)
    ways = Counter(found.how.values())
    table = Table(("tensors", "made by"), [(str(n), way) for way, n in ways.items()], right=frozenset({0}))
    lines = [
        f"source: {n} {'tensor' if n == 1 else 'tensors'}, {n_weights:,} weights: {what}"
        for what, (n, n_weights) in found.accounted.items()
        if n or what == "became tensors"
    ]
    lines += [f"derived from hyperparameters: {name}" for name in found.derived]
    shown = [finding for finding in found.findings if matches(match, finding.where or "")]
    lines += _finding_lines(shown)
    lines.append("proven: every weight of the source, and nothing else" if found.proven else "not proven")
    facts = {
        "schema": SCHEMAS["against"],
        "dest": printable(found.dest),
        "source": printable(found.source),
        "proven": found.proven,
        "tensors": {printable(name): how for name, how in found.how.items() if matches(match, name)},
        "accounted": {what: {"tensors": n, "weights": n_weights} for what, (n, n_weights) in found.accounted.items()},
        "derived": list(found.derived),
        "findings": [finding_json(finding) for finding in shown],
    }
    return Shown(table, lines, facts, found.proven)


def _finding_lines(findings: Sequence[Finding]) -> list[str]:
    return [f"{finding.severity}: {finding.code}: {finding}" for finding in findings]


def _number(error: float | None) -> float | str | None:
    """What JSON has no number for, as text."""
    return error if error is None or abs(error) < float("inf") else str(error)
