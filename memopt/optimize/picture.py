"""The picture of the trade-off: quality against speed, one bubble per candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from memopt.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Frame, svg

_QUALITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999)
# Beyond five nines are the roundings of float32 itself: nothing to tell apart.
_MOST_NINES = 5.0
_SIDES = ((1, "start"), (-1, "end"))
_GLYPH = 6.6  # pixels: width of a letter at 12 pixels, on the safe side
_LEGEND = 52  # pixels: the largest bubble fits
_KINDS = (
    ("good", "chosen"),
    ("bar", "passes the gate"),
    ("bad", "dropped"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One bubble of a trade-off chart; ``size`` in bytes becomes its area."""

    x: float
    y: float
    label: str
    size: float = 1.0
    style: str = "bar"  # bar | good | bad | soft


def tradeoff(
    points: Sequence[Point], x_label: str, y_label: str, *, gate: float | None = None
) -> str:
    """Return a bubble chart of a quality near 1 against a speed, with the Pareto front.

    The vertical axis counts nines (0.9, 0.99, 0.999 are one step apart): on a linear one all that
    is worth choosing among would lie on one line. Bubble area follows ``size`` in bytes; what is
    below ``gate`` lies in a shaded zone.

    >>> "<title>a: 1 x, y 0.99</title>" in tradeoff([Point(x=1, y=0.99, label="a")], "x", "y")
    True
    """
    ys = [_nines(p.y) for p in points] + ([_nines(gate)] if gate is not None else [])
    # Room on top and below for the largest bubble and its label.
    frame = Frame(0.0, max(p.x for p in points) * 1.12, min(ys) - 0.35, max(ys) + 0.35)
    levels = [(_nines(q), f"{q:g}") for q in _QUALITIES if frame.low <= _nines(q) <= frame.high]
    parts = frame.axes(x_label, y_label, levels)
    if gate is not None:
        y = frame.y(_nines(gate))
        parts.append(
            f'<rect class="zone" x="{LEFT}" y="{y:.1f}" width="{WIDTH - LEFT - RIGHT}" '
            f'height="{max(HEIGHT - BOTTOM - y, 0):.1f}"/><line class="gate" x1="{LEFT}" '
            f'x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/><text class="soft" '
            f'x="{LEFT + 6}" y="{y + 14:.1f}">below the gate of {gate:g}</text>'
        )
    front = _front(points, frame)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
    parts.append(f'<polyline class="front" points="{path}"/>')
    largest = max(p.size for p in points) or 1.0
    crossed, placed = _strips(front), []
    if gate is not None:
        y = frame.y(_nines(gate))
        crossed.append(_Box(LEFT, y - 2, WIDTH - RIGHT, y + 2))
        placed.append(_Box(LEFT, y + 2, LEFT + 140, y + 18))
    circles = []
    for point in sorted(points, key=lambda p: -p.size):
        x, y = frame.x(point.x), frame.y(_nines(point.y))
        radius = _radius(point.size, largest)
        placed.append(_Box(x - radius, y - radius, x + radius, y + radius))
        circles.append((point, x, y, radius))
        title = f"{point.label}: {point.x:,.4g} {x_label}, {y_label} {point.y:.5g}"
        parts.append(
            f'<circle class="{point.style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" '
            f'fill-opacity="0.7" stroke="var(--paper)"><title>{escape(title)}</title></circle>'
        )
    # The chosen one is labelled first: it has the best place.
    for point, x, y, radius in sorted(circles, key=lambda c: c[0].style != "good"):
        parts.append(_label(point, x, y, radius, placed, crossed))
    parts += _legend(points, largest)
    return svg(HEIGHT + _LEGEND, parts)


def _nines(quality: float) -> float:
    return -math.log10(max(1.0 - quality, 10**-_MOST_NINES))


def _radius(size: float, largest: float) -> float:
    return 5 + 17 * math.sqrt(max(size, 0.0) / largest)


@dataclass(frozen=True, slots=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def inside(self) -> bool:
        """Say whether it lies between the axes."""
        return (
            self.left > LEFT
            and self.right < WIDTH
            and self.top >= TOP
            and self.bottom < HEIGHT - BOTTOM
        )

    def hits(self, other: _Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def _front(points: Sequence[Point], frame: Frame) -> list[tuple[float, float]]:
    """Return pixels of the points that no other one beats in both directions, fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.x, -p.y)):
        if not best or _nines(point.y) > _nines(best[-1].y):
            best.append(point)
    return [(frame.x(p.x), frame.y(_nines(p.y))) for p in best]


def _strips(path: Sequence[tuple[float, float]]) -> list[_Box]:
    """Return small boxes along a line, so that a label keeps off it where it can."""
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(path):
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / 10))
        for step in range(steps):
            x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
            boxes.append(_Box(x - 3, y - 3, x + 3, y + 3))
    return boxes


def _label(
    point: Point, x: float, y: float, radius: float, placed: list[_Box], crossed: list[_Box]
) -> str:
    """Return the text of a bubble at the best place around it, and take that place.

    Beside it and free of everything; else beside it over a line; else farther off, with a pointer.
    """
    width, height = _GLYPH * len(point.label), 14.0
    shift = radius + 5
    near = [
        (x + shift, y, "start"),
        (x - shift, y, "end"),
        (x, y - shift - 4, "middle"),
        (x, y + shift + 5, "middle"),
    ]
    # Aslant: half beside, half above or below.
    near += [(x + side * shift * 0.7, y + up * shift, a) for up in (-1, 1) for side, a in _SIDES]
    far = [
        (x + side * shift, y + up * 13 * step, a)
        for step in range(2, 12)
        for up in (-1, 1)
        for side, a in _SIDES
    ]
    for places, others in ((near, [*placed, *crossed]), (near, placed), (far, placed)):
        for at, middle, anchor in places:
            left = at - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = _Box(left, middle - height / 2, left + width, middle + height / 2)
            if box.inside() and not any(box.hits(other) for other in others):
                placed.append(box)
                pointer = "" if places is near else _pointer(x, y, at, middle)
                return pointer + _text(point, at, middle, anchor)
    return _text(point, x + shift, y, "start")


def _pointer(x: float, y: float, at: float, middle: float) -> str:
    return f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{at:.1f}" y2="{middle:.1f}"/>'


def _text(point: Point, at: float, middle: float, anchor: str) -> str:
    weight = ' font-weight="600"' if point.style == "good" else ""
    return (
        f'<text class="halo" x="{at:.1f}" y="{middle + 4:.1f}" text-anchor="{anchor}"{weight}>'
        f"{escape(point.label)}</text>"
    )


def _legend(points: Sequence[Point], largest: float) -> list[str]:
    y, x = HEIGHT + _LEGEND // 2, float(LEFT)
    parts = []
    for style, name in _KINDS:
        if any(p.style == style for p in points):
            parts.append(
                f'<circle class="{style}" cx="{x + 5}" cy="{y - 4}" r="5" fill-opacity="0.8"/>'
                f'<text x="{x + 15}" y="{y}">{name}</text>'
            )
            x += 34 + 6.2 * len(name)
    parts.append(f'<line class="front" x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}"/>')
    parts.append(f'<text x="{x + 28}" y="{y}">Pareto front</text>')
    sizes = sorted({min(p.size for p in points), largest})
    right = float(WIDTH - RIGHT)
    for size in reversed(sizes):
        text = f"{size / 1e6:,.0f} MB"
        right -= 6.6 * len(text)
        parts.append(f'<text x="{right:.1f}" y="{y}">{text}</text>')
        radius = _radius(size, largest)
        right -= radius + 6
        parts.append(f'<circle class="outline" cx="{right:.1f}" cy="{y - 4}" r="{radius:.1f}"/>')
        right -= radius + 12
    return parts
