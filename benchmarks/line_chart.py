"""Line charts of benchmarks, for a page and as a picture of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from memopt.charts import altair, spec
from memopt.pages import style

COLOURS = ("#4a7bd0", "#1f9d63", "#c4473a", "#b7791f", "#7c5cc4", "#3aa0a8")


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    x_label: str,
    y_label: str,
    *,
    from_zero: bool = False,
    x_marks: Sequence[float] | None = None,
) -> Any:
    """Return a line chart of named (x, y) series on logarithmic axes.

    Args:
        from_zero: the vertical axis is linear and begins at 0, so that heights compare.
        x_marks: values to mark on the horizontal axis; None chooses round ones.
    """
    alt = altair()
    values = [{"name": name, "x": x, "y": y} for name, points in series for x, y in points]
    legend = alt.Legend(orient="top", title=None, columns=1, labelLimit=0)
    xs, ys = ([row[axis] for row in values] for axis in ("x", "y"))
    axis = alt.Axis(values=x_marks or _decades(xs), labelOverlap=False, format=",~f")
    up = alt.Scale(type="log", nice=False)
    up_axis = alt.Axis(values=_decades(ys), format=",~f")
    if from_zero:
        up, up_axis = alt.Scale(zero=True), alt.Axis(format=",~f")
    chart = alt.Chart(alt.Data(values=values)).mark_line(point=True)
    return chart.encode(
        x=alt.X("x:Q", title=x_label, scale=alt.Scale(type="log", nice=False), axis=axis),
        y=alt.Y("y:Q", title=y_label, scale=up, axis=up_axis),
        color=alt.Color(
            "name:N",
            sort=None,
            scale=alt.Scale(range=COLOURS),
            legend=legend if len(series) > 1 else None,
        ),
        tooltip=["name:N", alt.Tooltip("x:Q", title=x_label), alt.Tooltip("y:Q", title=y_label)],
    ).properties(width="container", height=320)


def _decades(values: Sequence[float]) -> list[float]:
    powers = range(math.ceil(math.log10(min(values))), math.floor(math.log10(max(values))) + 1)
    return [10.0**power for power in powers]


def picture(chart: Any, description: str) -> str:
    """Return a chart as an SVG file of its own, in the colours of a page."""
    import vl_convert

    drawn: str = vl_convert.vegalite_to_svg(spec(chart.properties(width=640), description))
    head, close, rest = drawn.partition(">")
    return f"{head}{close}<style>{style().partition('body{')[0]}</style>{rest}\n"
