"""docs/explanation/memory.md and its plots, from the figures of mapping.py. The prose is in mapping_page.md."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import mapping_verdicts as verdicts
from mapping_verdicts import amount, both, seconds, share, tightest
from plots import bar_plot, line_plot

Facts = dict[str, Any]

CAPS_PLOTS = """![Tokens per second under a cap](memory-cap.svg)

![Bytes read again per token under a cap](memory-read.svg)"""


def write_page(found: Facts, folder: Path) -> None:
    """memory.md, its plots (memory-*.svg) and its figures (memory.json)."""
    for name, plot in plots(found).items():
        (folder / f"memory-{name}.svg").write_text(plot)
    (folder / "memory.json").write_text(json.dumps(found, indent=1) + "\n")
    template = Template(Path(__file__).with_suffix(".md").read_text())
    (folder / "memory.md").write_text(_wrapped(template.substitute(values(found))))


def _wrapped(text: str) -> str:
    """Prose wrapped as in other pages; tables, headings and pictures stay as they are."""
    wrapped = []
    for paragraph in text.strip().split("\n\n"):
        bullets = paragraph.split("\n") if paragraph.startswith("- ") else [paragraph]
        if paragraph and paragraph[0] not in "|#!":
            bullets = [
                textwrap.fill(bullet, 120, subsequent_indent="  " if len(bullets) > 1 else "") for bullet in bullets
            ]
        wrapped.append("\n".join(bullets))
    return "\n\n".join(wrapped) + "\n"


def values(found: Facts) -> dict[str, str]:
    """What the template asks for."""
    ways = {(way["by"], way["state"]): way for way in found["start"]}
    cold = ways["map", "cold"]
    return {
        "model": _file(found["model"]),
        "shared": _file(found["shared"]),
        "machine": _machine(found["machine"]),
        "disk": _disk(found["machine"]),
        "runs": f"{found['runs']} of each, in turn; medians",
        "start_table": _start_table(found["start"]),
        "start_proof": verdicts.proof_of_cold(ways),
        "cold_read": amount(cold["device_read"]),
        "cold_major": f"{cold['major_faults']:.0f}",
        "processes_table": _processes_table(found),
        "processes_read": verdicts.how_many_read(found),
        "caps_how": verdicts.how_capped(found["caps"]),
        "caps_table": _caps_table(found),
        "caps_plots": CAPS_PLOTS if found["caps"]["points"] else "",
        "kinds_table": _kinds_table(cold, tightest(found, "map")),
        "sparse": verdicts.what_was_touched(found, cold),
        "alignments_table": _alignments_table(found["alignments"]),
        "alignments_verdict": verdicts.of_alignment(found["alignments"]),
        "verdict_start": verdicts.of_start(ways),
        "verdict_large": verdicts.of_large_models(found),
        "verdict_shared": verdicts.of_sharing(found),
        "verdict_sparse": verdicts.of_sparseness(found, cold),
    }


def plots(found: Facts) -> dict[str, str]:
    """By what stands in the file's name."""
    bars = {
        f"{way['by']}, {way['state']}": {"loading": way["load_seconds"], "first token": way["first_seconds"]}
        for way in found["start"]
    }
    shared = found["processes"]["map"]
    lines = {
        label: [(row["n"], row[name] / 1e9) for row in shared]
        for label, name in (("sum of RSS", "rss"), ("sum of Pss", "pss"), ("machine", "used"))
    }
    if found["processes"]["read"]:
        lines["read: sum of Pss"] = [(row["n"], row["pss"] / 1e9) for row in found["processes"]["read"]]
    ran = {
        by: [p for p in found["caps"]["points"] if p["by"] == by and p["outcome"] == "ran"] for by in ("map", "read")
    }
    size = found["model"]["size"]
    names = {"map": "mapping", "read": "reading (killed where it ends)"}
    rates = {names[by]: [(p["percent"], p["rate"]) for p in points] for by, points in ran.items() if points}
    again = {
        names[by]: [(p["percent"], 100 * p["device_read"] / size) for p in points]
        for by, points in ran.items()
        if points
    }
    cap = "memory for the model, in % of the file"
    made = {
        "start": bar_plot("Until the first token", "seconds", bars),
        "processes": line_plot("Processes on one file", "processes", "GB", lines),
    }
    if rates:
        made["cap"] = line_plot("Speed under a cap", cap, "tokens per second", rates, falling=True)
        made["read"] = line_plot("Read again for each token", cap, "% of the file", again, falling=True)
    return made


def _file(model: Facts) -> str:
    return f"{model['n_weights'] / 1e9:.2f} billion weights, {model['dtype']}, {amount(model['size'])}"


def _machine(machine: Facts) -> str:
    return (
        f"{machine['n_cpus']} processors ({machine['processor']}), {amount(machine['memory'])} of memory, "
        f"Linux {machine['kernel']}; {machine['load']:.1f} threads of other work wanted to run (load average before)"
    )


def _disk(machine: Facts) -> str:
    ahead = f", reads {machine['read_ahead'] >> 10} KiB ahead" if machine["read_ahead"] else ""
    return f"{machine['device_speed'] / 1e6:.0f} MB/s when read in large pieces{ahead}"


def _start_table(ways: Sequence[Facts]) -> str:
    heads = "way, page cache, loading, first token, both, later, from the disk, RssAnon, model in RSS, minor faults"
    return _table(
        heads,
        [
            (
                _doing(way["by"]),
                way["state"],
                seconds(way["load_seconds"]),
                seconds(way["first_seconds"]),
                seconds(both(way)),
                seconds(way["steady_seconds"]),
                amount(way["device_read"]),
                amount(way["rss_anon"]),
                amount(way["mapped"]),
                f"{way['minor_faults']:.0f}",
            )
            for way in ways
        ],
    )


def _processes_table(found: Facts) -> str:
    rows = [
        (str(row["n"]), *(amount(row[name]) for name in ("rss", "pss", "private", "used")))
        for row in found["processes"]["map"]
    ]
    return _table("processes, sum of RSS, sum of Pss, of it private, machine", rows)


def _caps_table(found: Facts) -> str:
    points = {(point["percent"], point["by"]): point for point in found["caps"]["points"]}
    size = found["model"]["size"]
    rows = []
    for percent in dict.fromkeys(percent for percent, _ in points):
        mapped, read = points[percent, "map"], points[percent, "read"]
        rows.append((f"{percent} %", *_cap_cells(mapped, size), _rate(read)))
    heads = "memory for the model, mapped, read again, major faults a token, minor, model in RSS, read"
    return _table(heads, rows) if rows else ""


def _cap_cells(point: Facts, size: int) -> tuple[str, ...]:
    if point["outcome"] != "ran":
        return _rate(point), "-", "-", "-", "-"
    faults = (f"{point[name]:.0f}" for name in ("major_faults", "minor_faults"))
    return _rate(point), share(point["device_read"], size), *faults, share(point["mapped"], size)


def _rate(point: Facts) -> str:
    return f"{point['rate']:.2f} tokens/s" if point["outcome"] == "ran" else "killed, out of memory"


def _kinds_table(cold: Facts, capped: Facts | None) -> str:
    under = {kind["name"]: kind for kind in capped["kinds"]} if capped else {}
    rows = []
    for kind in cold["kinds"]:
        shares = [share(kind["resident"][stage], kind["page_nbytes"]) for stage in ("before", "mapped", "token 1")]
        if under:
            shares.append(share(under[kind["name"]]["resident"]["token 10"], kind["page_nbytes"]))
        rows.append((kind["name"], str(kind["n_tensors"]), amount(kind["nbytes"]), *shares))
    end = f", at {capped['percent']} %" if capped else ""
    return _table("kind, tensors, size, before, when mapped, after one token" + end, rows)


def _alignments_table(rows: Sequence[Facts]) -> str:
    heads = "alignment, page cache, size, loading, first token, later tokens, from the disk, minor faults, major faults"
    return _table(
        heads,
        [
            (
                str(row["alignment"]),
                row["state"],
                amount(row["size"]),
                *(seconds(row[name]) for name in ("load_seconds", "first_seconds", "steady_seconds")),
                amount(row["device_read"]),
                *(f"{row[name]:.0f}" for name in ("minor_faults", "major_faults")),
            )
            for row in rows
        ],
    )


def _doing(by: str) -> str:
    return {"map": "mapping", "read": "reading"}[by]


def _table(heads: str, rows: Iterable[Sequence[str]]) -> str:
    names = heads.split(", ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
