"""`llamatools inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import EXIT_FINDINGS, EXIT_SOUND, LlamatoolsError, UsageError
from .options import Json, Threads
from .printing import Bar, print_json, print_styled, print_table

if TYPE_CHECKING:
    from ..check import Finding
    from ..check.memory import Need
    from ..check.residency import Residency
    from ..layout import Layout
    from ..sameness import Shown

# Ways to look at weights, each by itself, and the options that they make no use of.
WAYS = ("--hash", "--diff", "--against")
OTHER_VIEWS = ("--tensors", "--metadata", "--layout", "--residency", "--memory", "--html", "--align", "--scan")
# Options of options: each needs one of those behind it.
NEEDS = {
    "--full": ("--metadata", "--json"),
    "--imatrix": ("--against",),
    "--context": ("--memory",),
    "--force": ("--html",),
}


def inspect(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="GGUF, safetensors, .pth or ggjt files, Hugging Face or Meta folders."),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor and where it lies.")] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="List every metadata key.")] = False,
    match: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Only names in which this regular expression is found.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Show long values of metadata whole.")] = False,
    align: Annotated[
        int | None, typer.Option(help="Assert that every tensor begins at a multiple of this power of two.", min=1)
    ] = None,
    scan: Annotated[
        bool, typer.Option("--scan", help="Also read the weights: NaN, infinities, zeros, impossible scales.")
    ] = False,
    hashes: Annotated[
        bool, typer.Option("--hash", help="SHA-256 of tensors, metadata and weights, held against those stored inside.")
    ] = False,
    other: Annotated[
        Path | None, typer.Option("--diff", metavar="B", help="Compare weights, tokenizer and metadata with model B.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="SOURCE", help="Prove, byte for byte, that PATH is what SOURCE is converted to."),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="That PATH was quantized by, for --against.")
    ] = None,
    threads: Threads = None,
    layout_strip: Annotated[
        bool, typer.Option("--layout", help="Draw the file to scale. --match zooms, from the first to the last found.")
    ] = False,
    residency: Annotated[
        bool, typer.Option("--residency", help="Which pages of each tensor are in the page cache now.")
    ] = False,
    memory: Annotated[bool, typer.Option("--memory", help="What running the model takes of memory.")] = False,
    context: Annotated[
        int | None, typer.Option(help="Tokens that --memory counts with; the model's context by default.", min=1)
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write all of this as one page for a browser.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --html if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Show what is in a model file, where, and what is wrong with it. Nothing in it is executed."""
    from .. import overview, views

    _check_options({
        "--hash": hashes, "--diff": other, "--against": against, "--tensors": tensors, "--metadata": metadata,
        "--layout": layout_strip, "--residency": residency, "--memory": memory, "--html": html, "--align": align,
        "--scan": scan, "--full": full, "--json": as_json, "--imatrix": imatrix, "--context": context, "--force": force,
    })  # fmt: skip
    if hashes:
        raise typer.Exit(_hash(paths, match, threads, as_json))
    if other or against:
        raise typer.Exit(_compare(paths, other, against, imatrix, match, threads, as_json))
    if html is not None and len(paths) > 1:
        raise UsageError(f"a page shows one model, and {len(paths)} are named", where="--html")
    is_view = tensors or metadata or layout_strip or residency or memory or match is not None
    code, reports = 0, []
    for n, path in enumerate(paths):
        try:
            layout, findings = _inspected(path, align, scan, threads)
            resident, needs = _in_memory(layout, residency, memory, context)
        except LlamatoolsError as error:
            if len(paths) == 1 or isinstance(error, UsageError):
                raise
            print(error, file=sys.stderr)
            code = max(code, error.exit_code)
            continue
        if any(finding.severity == "error" for finding in findings):
            code = max(code, EXIT_FINDINGS)
        if html is not None:
            from ..page import write_page

            write_page(layout, findings, html, force=force)
        if as_json:
            facts = views.as_json(layout, match, findings=findings, full=full)
            reports.append(facts | _memory_json(layout, match, resident, needs))
            continue
        if html is not None and not is_view:
            continue
        if n:
            print()
        if metadata:
            print_table(views.metadata_table(layout, match, full=full))
        if layout_strip:
            from .. import strip

            print_styled(strip.lines(layout, match, resident=resident))
        if resident or needs:
            _print_memory(layout, match, resident, needs, is_drawn=layout_strip)
        if tensors or (match is not None and not (metadata or layout_strip or residency or memory)):
            print_table(views.tensor_table(layout, match))
        if not is_view:
            for line in overview.overview(layout, findings):
                print(line)
        else:
            for line in overview.finding_lines(findings):
                print(line, file=sys.stderr)
    if as_json:
        print_json(reports[0] if len(paths) == 1 else reports)
    raise typer.Exit(code)


def _check_options(given: dict[str, Any]) -> None:
    """Raises UsageError for options that would have no effect. given: option -> what it was given, if anything."""
    ways = [option for option in WAYS if given[option]]
    if len(ways) > 1:
        raise UsageError("one at a time", where=", ".join(WAYS))
    idle = [option for option in OTHER_VIEWS if ways and given[option]]
    if idle:
        raise UsageError(f"{ways[0]} makes no use of it. Ask for one at a time", where=idle[0])
    for option, users in NEEDS.items():
        if given[option] and not any(given[user] for user in users):
            raise UsageError(f"only {' and '.join(users)} make{'s' * (len(users) == 1)} use of it", where=option)


def _hash(paths: list[Path], match: str | None, threads: int | None, as_json: bool) -> int:
    """--hash; the exit code. Of a file that cannot be read whole, what is wrong with it is shown instead."""
    from .. import sameness

    shown = []
    for path in paths:
        layout, findings = _inspected(path, None, False, None)
        if layout.problems:
            shown.append(sameness.undigested(path, findings))
            continue
        with Bar() as bar:
            shown.append(sameness.digests(path, match, threads, bar))
    return _print_shown(shown, as_json)


def _compare(
    paths: list[Path],
    other: Path | None,
    against: Path | None,
    imatrix: Path | None,
    match: str | None,
    threads: int | None,
    as_json: bool,
) -> int:
    """--diff and --against; the exit code."""
    from .. import sameness

    if len(paths) > 1:
        raise UsageError(f"takes one PATH, not {len(paths)}", where="--diff" if other else "--against")
    with Bar() as bar:
        if other:
            shown = sameness.diff(paths[0], other, match, threads, bar)
        else:
            assert against is not None, "one of the two is given"
            shown = sameness.prove(paths[0], against, imatrix, match, threads, bar)
    return _print_shown([shown], as_json)


def _print_shown(shown: list[Shown], as_json: bool) -> int:
    if as_json:
        print_json(shown[0].facts if len(shown) == 1 else [each.facts for each in shown])
    for each in shown:
        if not as_json:
            if each.table:
                print_table(each.table)
            for line in each.lines:
                print(line)
    return EXIT_SOUND if all(each.sound for each in shown) else EXIT_FINDINGS


def _in_memory(
    layout: Layout, residency: bool, memory: bool, context: int | None
) -> tuple[dict[int, Residency], list[Need]]:
    if not (residency or memory):
        return {}, []
    from ..check.memory import needs
    from ..memory_views import residencies

    return residencies(layout) if residency else {}, needs(layout, context) if memory else []


def _memory_json(
    layout: Layout, match: str | None, resident: dict[int, Residency], needs: list[Need]
) -> dict[str, Any]:
    if not (resident or needs):
        return {}
    from ..memory_views import needs_json, residency_json

    facts: dict[str, Any] = {"residency": residency_json(layout, resident, match)} if resident else {}
    return facts | ({"memory": needs_json(needs)} if needs else {})


def _print_memory(
    layout: Layout, match: str | None, resident: dict[int, Residency], needs: list[Need], *, is_drawn: bool
) -> None:
    from .. import memory_views

    for line in memory_views.needs_lines(needs):
        print(line)
    if resident:
        if not is_drawn:
            print_table(memory_views.residency_table(layout, resident, match))
        for line in memory_views.residency_lines(layout, resident):
            print(line)


def _inspected(path: Path, align: int | None, scan: bool, threads: int | None) -> tuple[Layout, list[Finding]]:
    from ..check import by_severity, findings
    from ..recognise import inspect as inspect_path

    layout = inspect_path(path)
    found = findings(layout, align=align)
    if scan:
        from ..check.scan import scan as scan_weights
        from ..fill import default_threads

        with Bar() as bar:
            found += scan_weights(layout, threads=threads or default_threads(), on_progress=bar)
    return layout, by_severity(found)
