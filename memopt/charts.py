"""Charts as inline SVG and pages as one self-contained HTML file: nothing to fetch, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 16, 50

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#667085;--line:#d5dae1;--paper:#fff;
--bar:#4a7bd0;--good:#1f9d63;--bad:#c4473a}
@media(prefers-color-scheme:dark){:root{--ink:#e8ecf2;--soft:#98a2b3;--line:#364152;--paper:#12171f}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:1000px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--line)}
td.n{text-align:right;font-variant-numeric:tabular-nums}
svg{max-width:100%;height:auto}svg text{fill:var(--ink);font:12px system-ui,sans-serif}
svg .soft{fill:var(--soft)}svg .grid{stroke:var(--line)}
.bar{fill:var(--bar)}.good{fill:var(--good)}.bad{fill:var(--bad)}
polyline{fill:none;stroke-width:2}p.note{color:var(--soft)}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One bubble of a scatter chart; ``size`` is an area in the caller's unit."""

    x: float
    y: float
    label: str
    size: float = 1.0
    style: str = "bar"  # bar | good | bad


def page(title: str, sections: Sequence[tuple[str, str]], note: str = "") -> str:
    """Return a self-contained HTML page of (heading, HTML body) sections.

    >>> "<h2>A</h2>" in page("t", [("A", "<p>b</p>")])
    True
    """
    body = "".join(f"<h2>{escape(heading)}</h2>{html}" for heading, html in sections)
    lead = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{lead}{body}</html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an HTML table; numbers are right-aligned, everything is escaped.

    >>> table(["a"], [["<b>"]]).count("&lt;b&gt;")
    1
    """
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    lines = []
    for row in rows:
        cells = "".join(
            f'<td class="n">{cell:,.4g}</td>'
            if isinstance(cell, int | float) and not isinstance(cell, bool)
            else f"<td>{escape(str(cell))}</td>"
            for cell in row
        )
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def bars(rows: Sequence[tuple[str, float]], unit: str, *, highlight: str | None = None) -> str:
    """Return a horizontal bar chart of (label, value >= 0) rows, longest label first readable.

    >>> bars([("x", 2.0)], "s").startswith("<svg")
    True
    """
    height = 26 * len(rows) + 12
    label_width = min(280, 8 + max((7 * len(label) for label, _ in rows), default=0))
    top = max((value for _, value in rows), default=0.0) or 1.0
    parts = []
    for index, (label, value) in enumerate(rows):
        y = 6 + 26 * index
        length = (WIDTH - label_width - 110) * max(value, 0.0) / top
        style = "good" if label == highlight else "bar"
        parts.append(
            f'<text x="{label_width - 6}" y="{y + 14}" text-anchor="end">{escape(label)}</text>'
            f'<rect class="{style}" x="{label_width}" y="{y}" width="{length:.1f}" height="19" '
            f'rx="3"/><text x="{label_width + length + 6:.1f}" y="{y + 14}">'
            f"{value:,.4g} {escape(unit)}</text>"
        )
    return _svg(height, parts)


def histogram(values: Sequence[float], label: str, *, bins: int = 40) -> str:
    """Return a histogram of ``values`` with ``bins`` equal bins between their extremes.

    >>> histogram([0.0, 1.0, 1.0], "v", bins=2).count("<rect")
    2
    """
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / span * bins))] += 1
    frame = _Frame(low, low + span, 0.0, float(max(counts)))
    width = (WIDTH - LEFT - RIGHT) / bins
    parts = frame.axes(label, "count")
    for index, amount in enumerate(counts):
        y = frame.y(amount)
        parts.append(
            f'<rect class="bar" x="{LEFT + index * width:.1f}" y="{y:.1f}" '
            f'width="{max(width - 1, 0.5):.1f}" height="{HEIGHT - BOTTOM - y:.1f}"/>'
        )
    return _svg(HEIGHT, parts)


def scatter(
    points: Sequence[Point], x_label: str, y_label: str, *, gate: float | None = None
) -> str:
    """Return a bubble chart; bubble area follows ``size``; ``gate`` draws a horizontal line.

    >>> scatter([Point(x=1, y=2, label="a")], "x", "y").count("<circle")
    1
    """
    ys = [p.y for p in points] + ([gate] if gate is not None else [])
    frame = _Frame(0.0, max(p.x for p in points) * 1.15, *_padded(min(ys), max(ys)))
    largest = max(p.size for p in points) or 1.0
    parts = frame.axes(x_label, y_label)
    if gate is not None:
        y = frame.y(gate)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="currentColor" stroke-dasharray="5 4"/><text class="soft" x="{LEFT + 6}" '
            f'y="{y - 5:.1f}">gate {gate:g}</text>'
        )
    for point in sorted(points, key=lambda p: -p.size):
        radius = 4 + 16 * math.sqrt(max(point.size, 0.0) / largest)
        x, y = frame.x(point.x), frame.y(point.y)
        parts.append(
            f'<circle class="{point.style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" '
            f'fill-opacity="0.55"><title>{escape(point.label)}</title></circle>'
        )
    taken: list[tuple[float, float]] = []
    for point in points:
        x, y = frame.x(point.x), frame.y(point.y)
        # Labels of neighbours step down until they are free of each other.
        while any(abs(y - other) < 13 and abs(x - at) < 150 for at, other in taken):
            y += 13
        taken.append((x, y))
        anchor = "end" if x > WIDTH * 0.7 else "start"
        shift = -10 if anchor == "end" else 10
        parts.append(
            f'<text x="{x + shift:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">'
            f"{escape(point.label)}</text>"
        )
    return _svg(HEIGHT, parts)


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
) -> str:
    """Return a line chart of named (x, y) series; ``log`` makes both axes logarithmic (base 10).

    >>> lines([("s", [(1, 1), (10, 10)])], "x", "y", log=True).count("<polyline")
    1
    """
    scale = math.log10 if log else float
    flat = [(scale(x), scale(y)) for _, points in series for x, y in points]
    xs, ys = [x for x, _ in flat], [y for _, y in flat]
    frame = _Frame(*_padded(min(xs), max(xs)), *_padded(min(ys), max(ys)), log=log)
    colours = ("#4a7bd0", "#1f9d63", "#c4473a", "#b7791f", "#7c5cc4", "#3aa0a8")
    parts = frame.axes(x_label, y_label)
    for index, (name, points) in enumerate(series):
        colour = colours[index % len(colours)]
        path = " ".join(f"{frame.x(scale(x)):.1f},{frame.y(scale(y)):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" stroke="{colour}"/>')
        y = TOP + 16 + 17 * index
        parts.append(
            f'<rect x="{LEFT + 10}" y="{y - 9}" width="14" height="4" fill="{colour}"/>'
            f'<text x="{LEFT + 30}" y="{y - 2}">{escape(name)}</text>'
        )
    return _svg(HEIGHT, parts)


class _Frame:
    """Maps data to pixels and draws the axes."""

    def __init__(
        self, left: float, right: float, low: float, high: float, *, log: bool = False
    ) -> None:
        self.left, self.right, self.low, self.high, self.log = left, right, low, high, log

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) / ((self.right - self.left) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        span = (self.high - self.low) or 1
        return HEIGHT - BOTTOM - (value - self.low) / span * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_label: str, y_label: str) -> list[str]:
        parts = []
        for value in self._ticks(self.left, self.right):
            parts.append(
                f'<text class="soft" x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" '
                f'text-anchor="middle">{self._tick(value)}</text>'
            )
        for value in self._ticks(self.low, self.high):
            y = self.y(value)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="soft" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
                f"{self._tick(value)}</text>"
            )
        middle = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
            f'{escape(x_label)}</text><text x="14" y="{middle}" text-anchor="middle" '
            f'transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
        )
        return parts

    def _ticks(self, low: float, high: float) -> list[float]:
        """Return four to eight round numbers inside the range; decades where the axis is log."""
        span = (high - low) or 1.0
        power = 10.0 ** math.floor(math.log10(span / 4))
        step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= 8)
        if self.log and span >= 2:
            step = max(1.0, round(step))
        first = math.ceil(low / step - 1e-9)
        return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]

    def _tick(self, value: float) -> str:
        return f"{10**value if self.log else value:,.4g}"


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    return low - pad, high + pad


def _svg(height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
