"""Charts as inline SVG and pages as one self-contained HTML file: nothing to fetch, no script."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from html import escape

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 16, 50
# Height of a line of text.
_LINE = 14
# Up to so many points a line has dots that can be pointed at.
_FEW = 16
# More than so many decades need no marks between them.
_DECADES = 2.5
# A number that was formatted already, or a dash in its place.
_NUMBER = re.compile(r"-|[-+]?[\d,]+(\.\d+)?")

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#667085;--line:#d5dae1;--paper:#fff;
--bar:#4a7bd0;--good:#1f9d63;--bad:#c4473a}
@media(prefers-color-scheme:dark){:root{--ink:#e8ecf2;--soft:#98a2b3;--line:#364152;--paper:#12171f}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:1120px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%;font-size:.86rem}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--line)}
th{vertical-align:bottom}td:first-child{white-space:nowrap}td:last-child{min-width:9rem}
.n{text-align:right;font-variant-numeric:tabular-nums}td.n{white-space:nowrap;min-width:0}
.wide{overflow-x:auto}.row-good{font-weight:600}.row-good td{background:
color-mix(in srgb,var(--good) 14%,transparent)}.row-bad,.row-soft{color:var(--soft)}
svg{width:100%;max-width:860px;height:auto}svg text{fill:var(--ink);font:12px system-ui,sans-serif}
.soft{fill:var(--soft)}svg text.soft{fill:var(--soft)}svg .grid{stroke:var(--line)}
.bar{fill:var(--bar)}.good{fill:var(--good)}.bad{fill:var(--bad)}
.zone{fill:var(--bad);fill-opacity:.07}.gate{stroke:var(--bad);stroke-dasharray:5 4}
polyline{fill:none;stroke-width:2}.front{stroke:var(--soft);stroke-width:1.5;fill:none}
.outline{fill:none;stroke:var(--soft)}
svg .halo{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
p.note{color:var(--soft)}
"""


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


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], styles: Sequence[str] = ()
) -> str:
    """Return an HTML table; columns of numbers are right-aligned, everything is escaped.

    Args:
        styles: a style per row (good, bar, bad, soft), none for plain rows.

    >>> table(["a"], [["<b>"]]).count("&lt;b&gt;")
    1
    """
    numeric = [
        sum(_is_number(row[column]) for row in rows) * 2 > len(rows)
        for column in range(len(header))
    ]
    kinds = [' class="n"' if number else "" for number in numeric]
    head = "".join(
        f"<th{kind}>{escape(str(cell))}</th>" for cell, kind in zip(header, kinds, strict=True)
    )
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(
            f"<td{kind}>{escape(_text(cell))}</td>" for cell, kind in zip(row, kinds, strict=True)
        )
        style = f' class="row-{styles[index]}"' if styles else ""
        lines.append(f"<tr{style}>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _is_number(cell: object) -> bool:
    if isinstance(cell, int | float):
        return not isinstance(cell, bool)
    return _NUMBER.fullmatch(str(cell)) is not None


def _text(cell: object) -> str:
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return f"{cell:,.4g}" if isinstance(cell, float) else str(cell)


def bars(
    rows: Sequence[tuple[str, float]],
    unit: str,
    *,
    highlight: str | None = None,
    muted: Collection[str] = (),
) -> str:
    """Return a horizontal bar chart of (label, value >= 0) rows; a long label loses its middle.

    Args:
        highlight: the label of the best row.
        muted: labels of rows that are there for comparison.

    >>> bars([("x", 2.0)], "s").startswith("<svg")
    True
    """
    height = 26 * len(rows) + 12
    styles = ["good" if x == highlight else "soft" if x in muted else "bar" for x, _ in rows]
    rows = [(_short(label), value) for label, value in rows]
    label_width = 8 + max((7 * len(label) for label, _ in rows), default=0)
    top = max((value for _, value in rows), default=0.0) or 1.0
    parts = []
    for index, (label, value) in enumerate(rows):
        y = 6 + 26 * index
        length = (WIDTH - label_width - 110) * max(value, 0.0) / top
        style = styles[index]
        parts.append(
            f'<text x="{label_width - 6}" y="{y + 14}" text-anchor="end">{escape(label)}</text>'
            f'<rect class="{style}" x="{label_width}" y="{y}" width="{length:.1f}" height="19" '
            f'rx="3"/><text x="{label_width + length + 6:.1f}" y="{y + 14}">'
            f"{value:,.4g} {escape(unit)}</text>"
        )
    return svg(height, parts)


def _short(label: str, most: int = 48) -> str:
    half = (most - 1) // 2
    return label if len(label) <= most else f"{label[:half]}…{label[-half:]}"


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
    frame = Frame(low, low + span, 0.0, float(max(counts)))
    width = (WIDTH - LEFT - RIGHT) / bins
    parts = frame.axes(label, "count")
    for index, amount in enumerate(counts):
        y = frame.y(amount)
        parts.append(
            f'<rect class="bar" x="{LEFT + index * width:.1f}" y="{y:.1f}" '
            f'width="{max(width - 1, 0.5):.1f}" height="{HEIGHT - BOTTOM - y:.1f}"/>'
        )
    return svg(HEIGHT, parts)


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    from_zero: bool = False,
    x_marks: Sequence[float] | None = None,
) -> str:
    """Return a line chart of named (x, y) series.

    Args:
        log: both axes are logarithmic (base 10).
        from_zero: the vertical axis begins at 0, so that heights compare; only x is logarithmic.
        x_marks: values to mark on the horizontal axis; None chooses round ones.

    >>> lines([("s", [(1, 1), (10, 10)])], "x", "y", log=True).count("<polyline")
    1
    """
    across = math.log10 if log else float
    up = across if not from_zero else float
    flat = [(across(x), up(y)) for _, points in series for x, y in points]
    xs, ys = [x for x, _ in flat], [y for _, y in flat]
    bottom, top = (0.0, max(ys) * 1.1) if from_zero else _padded(min(ys), max(ys))
    frame = Frame(*_padded(min(xs), max(xs)), bottom, top, log=log, log_up=log and not from_zero)
    colours = ("#4a7bd0", "#1f9d63", "#c4473a", "#b7791f", "#7c5cc4", "#3aa0a8")
    columns = None if x_marks is None else [(across(mark), f"{mark:,g}") for mark in x_marks]
    parts = frame.axes(x_label, y_label, columns=columns)
    for index, (name, points) in enumerate(series):
        colour = colours[index % len(colours)]
        places = [(frame.x(across(x)), frame.y(up(y)), x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        parts.append(f'<polyline points="{path}" stroke="{colour}"/>')
        if len(places) <= _FEW:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
                f"<title>{left:,.6g} {escape(x_label)}: {value:,.4g} {escape(y_label)}</title>"
                "</circle>"
                for x, y, left, value in places
            ]
        if len(series) == 1:
            break  # the axis says what it is
        y = TOP + 16 + 17 * index
        parts.append(
            f'<rect x="{LEFT + 10}" y="{y - 9}" width="14" height="4" fill="{colour}"/>'
            f'<text x="{LEFT + 30}" y="{y - 2}">{escape(name)}</text>'
        )
    return svg(HEIGHT, parts)


def standalone(picture: str) -> str:
    """Return a picture as a file of its own: with the style that a page would give it.

    >>> standalone(svg(10, [])).count("<style>")
    1
    """
    head, close, rest = picture.partition(">")
    return f"{head}{close}<style>{_STYLE}</style>{rest}\n"


class Frame:
    """Maps data to pixels and draws the axes.

    With ``log`` the data are logarithms (base 10); ``log_up`` says so of the vertical axis alone.
    """

    def __init__(
        self,
        left: float,
        right: float,
        low: float,
        high: float,
        *,
        log: bool = False,
        log_up: bool | None = None,
    ) -> None:
        self.left, self.right, self.low, self.high = left, right, low, high
        self.log, self.log_up = log, log if log_up is None else log_up

    def x(self, value: float) -> float:
        """Return the pixel column of a value."""
        return LEFT + (value - self.left) / ((self.right - self.left) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the pixel row of a value."""
        span = (self.high - self.low) or 1
        return HEIGHT - BOTTOM - (value - self.low) / span * (HEIGHT - TOP - BOTTOM)

    def axes(
        self,
        x_label: str,
        y_label: str,
        levels: Sequence[tuple[float, str]] | None = None,
        columns: Sequence[tuple[float, str]] | None = None,
    ) -> list[str]:
        """Return ticks, grid and titles; ``levels``, ``columns``: what to mark, and its text."""
        parts = []
        for value, text in columns or _marks(self.left, self.right, self.log):
            parts.append(
                f'<text class="soft" x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" '
                f'text-anchor="middle">{text}</text>'
            )
        if levels is None:
            levels = _marks(self.low, self.high, self.log_up)
        below = math.inf
        for value, text in levels:
            y = self.y(value)
            if below - y < _LINE:  # it would touch the one below
                continue
            below = y
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="soft" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
            )
        middle = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
            f'{escape(x_label)}</text><text x="14" y="{middle}" text-anchor="middle" '
            f'transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
        )
        return parts


def _marks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    """Return four to eight round numbers inside the range with their text; log10 where ``log``."""
    span = (high - low) or 1.0
    if log:
        # Whole decades; where there are few, 2 and 5 between them.
        digits = (1,) if span > _DECADES else (1, 2, 5)
        powers = range(math.floor(low), math.ceil(high) + 1)
        values = [digit * 10.0**power for power in powers for digit in digits]
        inside = [value for value in values if low <= math.log10(value) <= high]
        return [(math.log10(value), f"{value:,.10g}") for value in inside]
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= 8)
    first = math.ceil(low / step - 1e-9)
    found = [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
    return [(value, f"{value:,.10g}") for value in found]


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    return low - pad, high + pad


def svg(height: int, parts: Sequence[str]) -> str:
    """Return the picture of these elements, ``WIDTH`` wide and as wide as the page at most.

    >>> svg(10, []).endswith("</svg>")
    True
    """
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
