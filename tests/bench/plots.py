"""Plots as SVG, legible on light and on dark ground: lines over numbers, and bars made of parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 700, 64, 310  # of the area that is plotted in
COLORS = ("#3b82f6", "#f97316", "#10b981", "#a855f7")
STYLE = """text { font: 13px sans-serif; fill: #24292f } .title { font-weight: 600; font-size: 15px }
.grid { stroke: #8886; stroke-width: 1 } .line { fill: none; stroke-width: 2.5 }
@media (prefers-color-scheme: dark) { text { fill: #d1d7de } }"""

Points = Sequence[tuple[float, float]]


def line_plot(title: str, x_label: str, y_label: str, series: Mapping[str, Points], *, falling: bool = False) -> str:
    """A line with a mark at each of its points. falling: the largest x is on the left."""
    xs = sorted({x for points in series.values() for x, _ in points}, reverse=falling)
    top, ticks = _scale(max((y for points in series.values() for _, y in points), default=1))

    def place(x: float, y: float) -> tuple[float, float]:
        part = (x - xs[0]) / (xs[-1] - xs[0]) if xs[0] != xs[-1] else 0.5
        return LEFT + 20 + part * (RIGHT - LEFT - 40), BOTTOM - y / top * (BOTTOM - TOP)

    parts = [_text(LEFT - 54, TOP - 12, y_label), _text((LEFT + RIGHT) / 2, HEIGHT - 10, x_label, "middle")]
    for tick in ticks:
        y = place(xs[0], tick)[1]
        parts += [f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>', _text(LEFT - 8, y + 4, f"{tick:g}", "end")]
    parts += [_text(place(x, 0)[0], BOTTOM + 20, f"{x:g}", "middle") for x in xs]
    for color, points in zip(COLORS, series.values(), strict=False):
        places = [place(*point) for point in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line" stroke="{color}" d="M{path}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in places]
    return _svg(title, list(series), parts)


def bar_plot(title: str, x_label: str, bars: Mapping[str, Mapping[str, float]]) -> str:
    """A horizontal bar for each name, made of its parts one after the other, with their sum behind it."""
    names = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    top, ticks = _scale(max(sum(bar.values()) for bar in bars.values()))
    left, right = LEFT + 90, RIGHT - 50
    step = (BOTTOM - TOP) / len(bars)
    parts = [_text((left + right) / 2, HEIGHT - 10, x_label, "middle")]
    for tick in ticks:
        x = left + tick / top * (right - left)
        parts += [f'<path class="grid" d="M{x:.1f} {TOP}V{BOTTOM}"/>', _text(x, BOTTOM + 20, f"{tick:g}", "middle")]
    for n, (name, bar) in enumerate(bars.items()):
        y, x = TOP + (n + 0.2) * step, float(left)
        parts.append(_text(left - 8, y + 0.3 * step + 5, name, "end"))
        for part, value in bar.items():
            width = value / top * (right - left)
            color = COLORS[names.index(part)]
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{0.6 * step:.1f}" fill="{color}"/>'
            )
            x += width
        parts.append(_text(x + 6, y + 0.3 * step + 5, f"{sum(bar.values()):.2f}"))
    return _svg(title, names, parts)


def _scale(largest: float) -> tuple[float, list[float]]:
    """The end of an axis from 0, and its ticks: steps of 1, 2 or 5 times a power of ten."""
    largest = largest or 1
    power = 10 ** math.floor(math.log10(largest / 4))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= largest / 5)
    count = math.ceil(largest / step)
    return count * step, [n * step for n in range(count + 1)]


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _box(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}"/>'


def _svg(title: str, names: Sequence[str], parts: Sequence[str]) -> str:
    """The picture: title, one colour per name, and what was drawn."""
    legend, x = [], LEFT + 130.0
    for color, name in zip(COLORS, names, strict=False):
        legend += [
            f'<rect x="{x}" y="{TOP - 22}" width="12" height="12" fill="{color}"/>',
            _text(x + 17, TOP - 11, name),
        ]
        x += 34 + 7.2 * len(name)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    titled = f'<text class="title" x="{LEFT - 54}" y="22">{escape(title)}</text>'
    return "\n".join([head, f"<style>{STYLE}</style>", titled, *legend, *parts, "</svg>"]) + "\n"
