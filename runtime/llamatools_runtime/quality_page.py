"""What was measured of a model as one page for a browser: figures and two drawings, with no script and no network.

A drawing is SVG in the page's own colours, light or dark as the reader has it. Whatever comes from outside, names of
files, is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from llamatools.draft import Draft, check_destination
from llamatools.errors import printable

from .quality import Quality, running
from .scoring import Estimate, Numbers

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 16, 40  # margins of a drawing
BARS = 60  # of the histogram
FLOOR = 1e-6  # nats; what diverges less is drawn as if by this much


@dataclass(frozen=True)
class Names:
    """What was measured with what, as it was named."""

    model: str
    text: str
    other: str | None = None


def write_page(quality: Quality, names: Names, destination: Path, *, force: bool = False) -> None:
    """Writes the page as a file that appears when it is whole. Raises as `Draft`."""
    check_destination(destination, [], force=force)
    data = page(quality, names).encode()
    with Draft(destination, len(data), force=force) as draft:
        draft.write(data, 0)
        draft.publish()


def page(quality: Quality, names: Names) -> str:
    """The page's text."""
    model, text = _shown(names.model), _shown(names.text)
    against = f", against {_shown(names.other)}" if names.other else ""
    tokens = f"{len(quality.surprise):,} tokens scored, in {quality.n_chunks} chunks of {quality.context}"
    charts = [_section("Perplexity of the chunks up to each", _perplexity_chart(quality))]
    if quality.scores is not None:
        charts.append(_section("KL divergence of single tokens", _divergence_chart(quality.scores.divergence)))
    rows = (f"<tr><td>{label}</td><td>{value} {unit}</td></tr>" for label, value, unit in _figures(quality))
    return Template((files(__package__) / "quality.html").read_text("utf-8")).substitute(
        title=f"{model} on {text}",
        about=f"{tokens}{against}. After ± stands a standard error.",
        figures="".join(rows),
        charts="".join(charts),
    )


def _shown(name: str) -> str:
    return escape(printable(Path(name).name or name))


def _figures(quality: Quality) -> Iterator[tuple[str, str, str]]:
    yield "perplexity", f"{quality.perplexity:.4f}", ""
    if quality.scores is not None:
        found = quality.against()
        yield "of the other", f"{found['base_perplexity']:.4f}", ""
        yield "ln of the ratio", f"{found['log_ratio']:.5f}", ""
        yield "KL divergence, mean", f"{found['mean_divergence']:.6f}", "nats"
        yield "median", f"{found['median_divergence']:.6f}", ""
        yield "99 %", f"{found['percentile99_divergence']:.6f}", ""
        yield "maximum", f"{quality.scores.divergence.max():.6f}", ""
        yield "likeliest token the same", f"{found['same_top'].scaled(100):.3f}", "%"
        yield "probability changed, RMS", f"{found['rms_change'].scaled(100):.3f}", "%"


def _section(title: str, drawing: str) -> str:
    return f'<h2>{title}</h2><section class="panel">{drawing}</section>'


@dataclass(frozen=True)
class _Frame:
    """From numbers to places in a drawing."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM)

    def drawing(self, parts: Sequence[str], x_ticks: dict[float, str], y_ticks: dict[float, str], label: str) -> str:
        """The parts over the axes. ticks: where on an axis stands which text. label: of the x axis."""
        axes = [
            f'<path class="axis" d="M{LEFT} {self.y(at):.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 8}" y="{self.y(at) + 4:.1f}" text-anchor="end">{text}</text>'
            for at, text in y_ticks.items()
        ] + [
            f'<text x="{self.x(at):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{text}</text>'
            for at, text in x_ticks.items()
        ]
        caption = f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{label}</text>'
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join([*axes, *parts])}{caption}</svg>'


def _perplexity_chart(quality: Quality) -> str:
    """Lines with a band of one standard error, for the model and, if there is one, for the other."""
    curves = {"model": quality.running_perplexity}
    if quality.scores is not None:
        curves["other"] = running(quality.scores.base_surprise, quality.n_chunks)
    seen = [value for curve in curves.values() for e in curve for value in (e.value - e.error, e.value + e.error)]
    ticks = _ticks(min(seen), max(seen))
    frame = _Frame(0.5, quality.n_chunks + 0.5, min(*seen, *ticks), max(*seen, *ticks))
    parts = [part for name, curve in curves.items() for part in _curve(frame, name, curve)]
    x_ticks = {at: f"{at:g}" for at in _ticks(1, quality.n_chunks) if at == int(at) and 1 <= at <= quality.n_chunks}
    return frame.drawing(parts, x_ticks, {at: f"{at:g}" for at in ticks}, "chunks")


def _curve(frame: _Frame, name: str, curve: Sequence[Estimate]) -> Iterator[str]:
    xs = [frame.x(n) for n in range(1, len(curve) + 1)]
    upper, middle, lower = ([frame.y(e.value + k * e.error) for e in curve] for k in (1, 0, -1))
    yield f'<path class="band {name}" d="M{_points([*xs, *reversed(xs)], [*upper, *reversed(lower)])}Z"/>'
    yield f'<path class="line {name}" d="M{_points(xs, middle)}"/>'
    if len(curve) <= 100:  # each can be pointed at
        for n, (x, y, estimate) in enumerate(zip(xs, middle, curve, strict=True), 1):
            title = f"<title>chunk {n}: {estimate:.4f}</title>"
            yield f'<circle class="dot {name}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>'
    y = middle[-1] + (18 if name == "other" else -9)  # apart, where the curves are close
    yield f'<text class="name" x="{xs[-1]:.1f}" y="{y:.1f}" text-anchor="end">the {name}</text>'


def _points(xs: Sequence[float], ys: Sequence[float]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))


def _divergence_chart(divergence: Numbers) -> str:
    """A histogram over a logarithmic axis, with median, mean and 99 % marked."""
    logs = np.log10(np.maximum(divergence, FLOOR))
    low, high = math.floor(logs.min()), max(math.ceil(logs.max()), math.floor(logs.min()) + 1)
    counts, edges = np.histogram(logs, BARS, (low, high))
    ticks = _ticks(0, float(counts.max()))
    frame = _Frame(low, high, 0, max(ticks[-1], 1.12 * float(counts.max())))
    floor = frame.y(0)
    parts = [
        f'<rect class="bar" x="{frame.x(a) + 0.5:.1f}" y="{frame.y(float(count)):.1f}" '
        f'width="{frame.x(b) - frame.x(a) - 1:.1f}" height="{floor - frame.y(float(count)):.1f}">'
        f"<title>{10**a:.2g} to {10**b:.2g} nats: {count} tokens</title></rect>"
        for a, b, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True)
        if count
    ]
    marks = {"median": np.median(divergence), "mean": np.mean(divergence), "99 %": np.quantile(divergence, 0.99)}
    for n, (name, value) in enumerate(marks.items()):
        x = frame.x(math.log10(max(float(value), FLOOR)))
        side, anchor = (-5, "end") if name == "median" and x > LEFT + 110 else (5, "start")
        parts.append(f'<path class="mark" d="M{x:.1f} {TOP}V{floor}"/>')
        at = f'x="{x + side:.1f}" y="{TOP + 10 + 15 * n}" text-anchor="{anchor}"'
        parts.append(f'<text class="name" {at}>{name} {value:.3g}</text>')
    x_ticks = {float(decade): f"{10.0**decade:g}" for decade in range(low, high + 1)}
    return frame.drawing(parts, x_ticks, {at: f"{at:g}" for at in ticks}, "nats; height: how many tokens")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to nine, that span low to high."""
    span = max(high - low, 1e-9 * abs(high), 1e-12)
    power = 10.0 ** math.floor(math.log10(span))
    step = next(s * power for s in (0.2, 0.5, 1.0, 2.0) if span / (s * power) <= 6)
    return [round(n * step, 12) for n in range(math.floor(low / step), math.ceil(high / step) + 1)]
