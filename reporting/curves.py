"""Curves of a run as inline SVG, which a browser scales and colours by the style sheet of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34  # room around the curves, for the numbers
MOST_POINTS = 500  # of a curve: more cannot be seen
Place = Callable[[float], float]  # of a step or a value in the picture

COLOURS = 8  # of the style sheet: var(--c0) to var(--c7)


class Line(NamedTuple):
    """One curve."""

    label: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    colour: int = 0
    marked: bool = False
    """whether each value has a point, on a dashed line: for few values, such as those of evaluations"""


def chart(lines: Iterable[Line], logarithmic: bool = False) -> Markup:
    """Return curves over optimizer steps as an SVG element with a legend; "" where no value is finite.

    A few values far above all others, and those that are not finite, are crosses at the upper edge: one spike must not
    flatten a whole curve. logarithmic: powers of ten have equal distances, and values of 0 or less are left out.
    """
    drawn = {line: line_points(line, logarithmic) for line in lines}
    shown = [value for points in drawn.values() for _, value in points if math.isfinite(value)]
    if not shown:
        return Markup("")
    lines = [line for line, points in drawn.items() if points]
    low, high = limits(shown)
    last = max(max(line.steps) for line in lines)
    first = min(min(line.steps) for line in lines)
    first = 0 if first < last / 4 else first

    def x(step: float) -> float:
        return LEFT + (step - first) / max(1, last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - min(max(value, low), high)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [axes(ticks(first, last), level_ticks(low, high, logarithmic), x, y)]
    parts += [curve(line, drawn[line], x, y, high) for line in lines]
    label = ", ".join(dict.fromkeys(line.label for line in lines))
    box = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    return Markup(box) + legend(lines)


def line_points(line: Line, logarithmic: bool) -> list[tuple[int, float]]:
    """Return the steps and the values of a line as they are drawn; those that are not finite are infinite."""
    pairs = [(step, value if math.isfinite(value) else math.inf) for step, value in zip(line.steps, line.values)]
    if not logarithmic:
        return pairs
    return [(step, math.log10(value) if value < math.inf else value) for step, value in pairs if value > 0]


def curve(line: Line, points: Sequence[tuple[int, float]], x: Place, y: Place, high: float) -> str:
    """Return the path of a line through its finite points, its marks, and a cross for each point above the edge."""
    style = f'style="stroke:var(--c{line.colour % COLOURS})"'
    words, pen = [], "M"
    for step, value in thin(points):
        if not math.isfinite(value):
            pen = "M"  # the line is broken there
            continue
        words.append(f"{pen}{x(step):.1f} {y(value):.1f}")
        pen = "L"
    out = [f'<path class="{"few" if line.marked else "many"}" {style} d="{"".join(words)}"/>']
    if line.marked:
        fill = f'style="fill:var(--c{line.colour % COLOURS})"'
        for step, value in points:
            if math.isfinite(value):
                told = escape(f"{line.label}, step {step:,}: {line.values[line.steps.index(step)]:.4g}")
                out.append(
                    f'<circle r="3" cx="{x(step):.1f}" cy="{y(value):.1f}" {fill}><title>{told}</title></circle>'
                )
    for step, value in points:
        if value > high or not math.isfinite(value):
            out.append(f'<text class="cross" x="{x(step):.1f}" y="{TOP + 5}" {style}>×</text>')
    return "".join(out)


def axes(steps: Sequence[float], levels: Sequence[tuple[float, str]], x: Place, y: Place) -> str:
    """Return the grid with its numbers."""
    out = []
    for value, text in levels:
        out.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="level" x="{LEFT - 6}" y="{y(value) + 4:.1f}">{text}</text>')
    for step in steps:
        out.append(f'<path class="grid" d="M{x(step):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        out.append(f'<text class="step" x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 16}">{short(step)}</text>')
    out.append(f'<text class="step" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}">step</text>')
    return "".join(out)


def legend(lines: Sequence[Line]) -> Markup:
    """Return the labels of lines with their colours; nothing for a single line."""
    if len(lines) < 2:
        return Markup("")
    keys = [
        Markup('<span><i class="{}" style="--c:var(--c{})"></i>{}</span>').format(
            "few" if line.marked else "many", line.colour % COLOURS, line.label
        )
        for line in lines
    ]
    return Markup('<p class="legend">{}</p>').format(Markup("").join(keys))


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest value to show, with a margin, without a few far above the others."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    if len(ordered) > 20 and high - low > 4 * (usual - low) > 0:
        high = low + 1.25 * (usual - low)
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most about MOST_POINTS points of a curve: the lowest and the highest of each stretch, in order."""
    size = -(-2 * len(points) // MOST_POINTS)
    if size <= 2:
        return list(points)
    kept = []
    for at in range(0, len(points), size):
        part = points[at : at + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= most)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def level_ticks(low: float, high: float, logarithmic: bool) -> list[tuple[float, str]]:
    """Return the values of the grid between two limits, as they are drawn and as text."""
    if not logarithmic:
        return [(value, short(value)) for value in ticks(low, high)]
    whole = [power for power in range(math.ceil(low), math.floor(high) + 1)]
    if len(whole) >= 2:
        return [(power, short(10.0**power)) for power in whole]
    return [(math.log10(v), short(v)) for v in ticks(10**low, 10**high) if v > 0]


def short(value: float) -> str:
    """Return a number of the grid in few characters: 1500 -> 1500, 20000 -> 20k, 0.0002 -> 2e-4."""
    value = float(f"{value:.6g}")  # 0.30000000000000004
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < abs(value) < 1e-3:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:g}"
