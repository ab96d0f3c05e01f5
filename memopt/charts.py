"""The charts of reports, by Altair, in the colours of a page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memopt.extras import require

_QUALITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999)
# Beyond five nines are the roundings of float32 itself: nothing to tell apart.
_MOST_NINES = 5.0
_BINS = 40
# Vega expression of the text at a mark of an axis of nines, and of one of shares of power: below
# the share stands the cosine that an error at right angles to the exact output leaves.
_NINES = "format(1 - pow(10, -datum.value), '.5~f')"
_SHARE = "[format(datum.value, '.6~%'), format(1 / sqrt(1 + datum.value), '.5~f')]"

# Colours are the page's, so that they follow its light and dark.
_COLOURS = {"good": "var(--good)", "bar": "var(--bar)", "bad": "var(--bad)", "soft": "var(--soft)"}
_KINDS = {"good": "chosen", "bar": "passes the gate", "bad": "dropped"}
_TEXT = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
_CONFIG = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "text": {"fontSize": 12, "fill": "var(--ink)"},
    "rule": {"stroke": "var(--ink)"},
    "axis": {
        **_TEXT,
        "labelFlush": False,
        "labelColor": "var(--soft)",
        "titleColor": "var(--ink)",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
    },
    "legend": {**_TEXT, "labelColor": "var(--ink)"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One row of a bar chart; ``low`` and ``high`` are the ends of its interval."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    style: str = "bar"  # bar | good | bad | soft


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One bubble of a trade-off chart; ``size`` in bytes becomes its area.

    ``number`` stands in the bubble; ``x_low``, ``x_high`` and ``y_low`` are ends of intervals.
    """

    x: float
    y: float
    label: str
    number: int
    size: float = 1.0
    style: str = "bar"  # bar | good | bad
    x_low: float | None = None
    x_high: float | None = None
    y_low: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a bar that is cut into parts: the bar's label, the part's name, its length."""

    row: str
    name: str
    value: float


def altair() -> Any:
    """Return Altair.

    Raises:
        MissingExtra: it or what writes its script into a page is not installed.
    """
    require("vl_convert", extra="report", why="write a report")
    return require("altair", extra="report", why="write a report")


def spec(chart: Any, description: str) -> dict[str, Any]:
    """Return the Vega-Lite specification of a chart, in the style of a page."""
    found: dict[str, Any] = chart.to_dict()
    del found["$schema"]  # an address, which nobody shall fetch
    fit = {"type": "fit-x", "contains": "padding"}
    return {**found, "autosize": fit, "config": _CONFIG, "description": description}


def bars(
    rows: Sequence[Bar], unit: str = "", *, gate: float | None = None, shares: bool = False
) -> Any:
    """Return a horizontal bar chart, the labels over the bars, whiskers where there are intervals.

    Args:
        unit: behind each value.
        gate: a value to mark.
        shares: the values are squared errors over power: dots on a logarithmic axis that tells
            the cosine each leaves.
    """
    alt = altair()
    least = min((row.value for row in rows if row.value > 0), default=1e-6) / 2
    values = [
        {
            **asdict(row),
            "place": place,
            "shown": f"{100 * row.value:.3g} %" if shares else f"{row.value:,.4g} {unit}".strip(),
            "at": max(row.value, least) if shares else row.value,
            "end": row.value if row.high is None else row.high,
        }
        for place, row in enumerate(rows)
    ]
    # Room for the value behind the longest bar, on a page of 400 pixels too.
    most = max((max(row["end"], gate or 0.0) for row in values), default=0.0) or 1.0
    scale = alt.Scale(domain=[0, most * 1.4], nice=False)
    axis = None
    if shares:
        scale = alt.Scale(type="log", domain=[least, most * 30], nice=False)
        places = (m * 10.0**power for power in range(-12, 3) for m in (1, 3))
        marks = [place for place in places if least <= place <= most * 30]
        axis = alt.Axis(
            labelExpr=_SHARE,
            labelPadding=20,
            orient="top",
            values=marks,
            labelOverlap="greedy",
            title=["error over power,", "and the cosine it leaves"],
        )
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("place:O", axis=None),
        tooltip=[alt.Tooltip("label:N", title=" "), alt.Tooltip("shown:N", title="value")],
    )
    x = alt.X("at:Q", scale=scale, axis=axis)
    colours = alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values()))
    colour = alt.Color("style:N", legend=None, scale=colours)
    mark = base.mark_bar(size=14, yOffset=9)
    if shares:
        mark = base.mark_circle(size=80, yOffset=9, opacity=1)
    layers = [
        mark.encode(x=x, color=colour),
        base.mark_text(align="left", yOffset=-8, limit=alt.ExprRef("width")).encode(
            x=alt.value(2), text="label:N"
        ),
        base.mark_text(align="left", dx=7, yOffset=9).encode(
            x=alt.X("at:Q" if shares else "end:Q"), text="shown:N"
        ),
    ]
    if any(row.low is not None for row in rows):
        layers.insert(1, base.mark_rule(yOffset=9, strokeWidth=2).encode(x="low:Q", x2="high:Q"))
    if gate is not None:
        layers.append(_gate(alt, gate, f"gate {gate:.4g}", across=False))
    return alt.layer(*layers).properties(width="container", height=40 * len(rows))


def parts(pieces: Sequence[Part], unit: str) -> Any:
    """Return horizontal bars cut into named parts, in their order, with a legend below."""
    alt = altair()
    names = list(dict.fromkeys(piece.name for piece in pieces))
    values = [
        {**asdict(piece), "place": names.index(piece.name), "shown": f"{piece.value:.3g} {unit}"}
        for piece in pieces
    ]
    legend = alt.Legend(orient="bottom", direction="horizontal", columns=2, title=None)
    bar_rows = list(dict.fromkeys(piece.row for piece in pieces))
    base = alt.Chart(alt.Data(values=values)).mark_bar(stroke="var(--paper)", strokeWidth=1)
    return base.encode(
        y=alt.Y("row:N", title=None, sort=bar_rows, axis=alt.Axis(labelLimit=220)),
        x=alt.X("value:Q", title=unit, stack="zero"),
        color=alt.Color(
            "name:N", legend=legend, sort=names, scale=alt.Scale(scheme="tableau20", domain=names)
        ),
        order=alt.Order("place:Q"),
        tooltip=[
            alt.Tooltip("row:N", title=" "),
            alt.Tooltip("name:N", title="part"),
            alt.Tooltip("shown:N", title="time"),
        ],
    ).properties(width="container", height=40 * len(bar_rows) + 20)


def _gate(alt: Any, place: float, text: str, *, across: bool) -> Any:
    """Return the line of a gate with its text, ``across`` the chart or from top to bottom."""
    base = alt.Chart(alt.Data(values=[{"gate": place, "text": text}]))
    line = base.mark_rule(stroke=_COLOURS["bad"], strokeDash=[5, 4])
    words = base.mark_text(align="left", dx=5, dy=10 if across else 0, fill=_COLOURS["bad"])
    if across:
        return line.encode(y="gate:Q") + words.encode(y="gate:Q", x=alt.value(0), text="text:N")
    return line.encode(x="gate:Q") + words.encode(x="gate:Q", y=alt.value(-8), text="text:N")


def nines(quality: float) -> float:
    """Return how many nines a quality near 1 has, five at most.

    >>> nines(0.99), nines(1.0)
    (2.0, 5.0)
    """
    return round(-math.log10(max(1.0 - quality, 10**-_MOST_NINES)), 9)


def _nines_axis(alt: Any, low: float, high: float, title: str) -> dict[str, Any]:
    marks = [place for place in map(nines, _QUALITIES) if low <= place <= high]
    return {
        "scale": alt.Scale(domain=[low, high], nice=False, zero=False),
        "axis": alt.Axis(values=marks, labelExpr=_NINES, title=title, labelOverlap="greedy"),
    }


def histogram(cosines: Sequence[float], label: str, *, gate: float) -> Any:
    """Return a histogram of cosines on an axis that counts nines, with the gate they must keep."""
    alt = altair()
    places = [nines(value) for value in cosines]
    low, high = min(*places, nines(gate)) - 0.1, max(*places, nines(gate)) + 0.1
    width = (high - low) / _BINS
    counts = Counter(min(_BINS - 1, int((place - low) / width)) for place in places)
    values = [
        {
            "low": low + width * index,
            "high": low + width * (index + 1),
            "count": count,
            "cosine": " to ".join(
                f"{1 - 10 ** -(low + width * n):.5f}" for n in (index, index + 1)
            ),
        }
        for index, count in sorted(counts.items())
    ]
    columns = alt.Chart(alt.Data(values=values)).mark_bar(
        orient="vertical", fill=_COLOURS["bar"], stroke="var(--paper)", strokeWidth=1
    )
    columns = columns.encode(
        x=alt.X("low:Q", **_nines_axis(alt, low, high, label)),
        x2="high:Q",
        y=alt.Y("count:Q", title="inputs", axis=alt.Axis(tickMinStep=1)),
        tooltip=["cosine:N", alt.Tooltip("count:Q", title="inputs")],
    )
    line = _gate(alt, nines(gate), f"gate {gate:g}", across=False)
    return alt.layer(columns, line).properties(width="container", height=260)


def tradeoff(
    points: Sequence[Point], x_label: str, y_label: str, *, gate: float | None = None
) -> Any:
    """Return a bubble chart of a quality near 1 against a speed, with the Pareto front.

    The vertical axis counts nines (0.9, 0.99, 0.999 are one step apart): on a linear one all that
    is worth choosing among would lie on one line. Each bubble has its number, beside it where
    others lie; what is below ``gate`` lies in a shaded zone.
    """
    alt = altair()
    values = _rows(points)
    ys = [row["nines"] for row in values] + [row["nines_low"] for row in values]
    ys += [] if gate is None else [nines(gate)]
    low, high = min(ys) - 0.35, max(ys) + 0.35
    x = alt.X(
        "x:Q", title=x_label, scale=alt.Scale(domainMin=0, nice=True), axis=alt.Axis(tickCount=5)
    )
    y = alt.Y("nines:Q", **_nines_axis(alt, low, high, y_label))
    base = alt.Chart(alt.Data(values=values)).encode(
        x=x,
        y=y,
        tooltip=[
            alt.Tooltip("title:N", title=" "),
            alt.Tooltip("x:Q", title=x_label, format=",.4~r"),
            alt.Tooltip("y:Q", title=y_label, format=".5~f"),
            alt.Tooltip("megabytes:Q", title="MB", format=",.1f"),
            alt.Tooltip("beside:N", title="at the same place"),
        ],
    )
    below = {"orient": "bottom", "direction": "horizontal", "title": None}
    kinds = [kind for kind in _KINDS if any(point.style == kind for point in points)]
    scale = alt.Scale(domain=[_KINDS[k] for k in kinds], range=[_COLOURS[k] for k in kinds])
    legend = alt.Legend(**below, columns=1, symbolOpacity=1)
    front = base.transform_filter("datum.front").mark_line(stroke=_COLOURS["soft"], strokeWidth=1.5)
    layers = [
        front.encode(order="x:Q", tooltip=alt.value(None)),
        base.mark_rule(strokeOpacity=0.5).encode(x="x_low:Q", x2="x_high:Q"),
        base.mark_rule(strokeOpacity=0.5).encode(y=alt.Y("nines_low:Q"), y2="nines:Q"),
        base.mark_point(filled=True, fillOpacity=0.3, strokeWidth=1.5).encode(
            size=_area(alt, [row["megabytes"] for row in values], below),
            fill=alt.Fill("kind:N", scale=scale, legend=legend),
            stroke=alt.Stroke("kind:N", scale=scale, legend=legend),
        ),
        base.mark_text(
            fontWeight="bold", dx=alt.ExprRef("datum.dx"), dy=alt.ExprRef("datum.dy")
        ).encode(text="number:N"),
    ]
    if gate is not None:
        place = alt.Chart(alt.Data(values=[{"gate": nines(gate)}]))
        zone = place.mark_rect(fill=_COLOURS["bad"], opacity=0.07)
        zone = zone.encode(
            y="gate:Q", y2=alt.value("height"), x=alt.value(0), x2=alt.value("width")
        )
        layers[:0] = [zone, _gate(alt, nines(gate), f"below the gate of {gate:g}", across=True)]
    return alt.layer(*layers).properties(width="container", height=380)


def _area(alt: Any, megabytes: Sequence[float], legend: dict[str, Any]) -> Any:
    """Return the channel that tells a file's size by a bubble's, with the ends in the legend."""
    return alt.Size(
        "megabytes:Q",
        scale=alt.Scale(domain=[0, max(megabytes)], range=[60, 900]),
        legend=alt.Legend(
            **legend,
            columns=1,
            values=sorted({min(megabytes), max(megabytes)}),
            labelExpr="format(datum.value, ',.0f') + ' MB'",
            symbolFillColor="transparent",
            symbolStrokeColor="var(--soft)",
        ),
    )


def _rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the rows of a trade-off chart; where bubbles coincide, numbers stand around them."""
    most = max(point.x for point in points) or 1.0
    rows = []
    for point in points:
        level = nines(point.y)
        near = [
            other
            for other in points
            if abs(other.x - point.x) / most < 0.04 and abs(nines(other.y) - level) < 0.12
        ]
        turn = 2 * math.pi * near.index(point) / len(near)
        away = 22 if len(near) > 1 else 0  # pixels
        rows.append(
            {
                **asdict(point),
                "kind": _KINDS[point.style],
                "title": f"{point.number}  {point.label}",
                "beside": ", ".join(o.label for o in near if o is not point) or "-",
                "nines": level,
                "nines_low": level if point.y_low is None else nines(point.y_low),
                "megabytes": point.size / 1e6,
                "dx": round(away * math.cos(turn)),
                "dy": round(-away * math.sin(turn)),
                # On the front is what no other one beats in both directions.
                "front": not any(
                    other.x >= point.x
                    and nines(other.y) >= level
                    and (other.x, nines(other.y)) != (point.x, level)
                    for other in points
                ),
            }
        )
    return rows
