"""The outcome of ``memopt optimize`` as a rich table and as one picture of the trade-off."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from memopt import charts, pages
from memopt.benchmark.record import interval
from memopt.files import atomic_path
from memopt.optimize.plan import Optimized, Outcome
from memopt.tasks.quality import MEASURES

HEADER = (
    "candidate",
    "device",
    "result",
    "min cosine",
    "mean",
    "items/s",
    "x float",
    "p50 ms",
    "MB",
    "built in s",
    "why",
)
# Style of a bubble and of a cell.
STYLES = {"chosen": "good", "kept": "bar", "dropped": "bad", "skipped": "soft"}
# The same for a terminal.
_COLOURS = {"chosen": "bold green", "dropped": "red", "skipped": "dim"}


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes fastest first, those not measured last."""
    return sorted(outcomes, key=lambda outcome: -(outcome.items_per_second or 0.0))


def rows(result: Optimized) -> list[list[str]]:
    """Return one row of formatted cells per candidate, fastest first, unmeasured ones last."""

    def number(value: float | None, pattern: str) -> str:
        return "-" if value is None else format(value, pattern)

    lines = []
    for outcome in ranked(result.outcomes):
        speed = outcome.items_per_second
        times = speed / result.reference if speed and result.reference else None
        lines.append(
            [
                outcome.candidate.name,
                outcome.candidate.device,
                _result(outcome),
                number(outcome.shown, ".4f"),
                number(outcome.cosine_mean, ".5f"),
                number(speed, ",.0f"),
                number(times, ".2f"),
                number(outcome.latency_ms_p50, ".2f"),
                f"{outcome.bytes / 1e6:.1f}" if outcome.bytes else "-",
                "reused" if outcome.reused else f"{outcome.seconds:.0f}",
                outcome.reason,
            ]
        )
    return lines


def table(result: Optimized) -> Any:
    """Return a rich table of the outcomes."""
    from rich.table import Table

    measure, bound = _gate(result)
    made = Table(title=f"{result.inputs} inputs, gate: {measure} {bound:g}")
    for name in _header(result):
        numeric = name not in ("candidate", "device", "result", "why")
        made.add_column(name, justify="right" if numeric else "left")
    for outcome, line in zip(ranked(result.outcomes), rows(result), strict=True):
        style = _COLOURS.get(outcome.status, "green" if outcome.single else None)
        made.add_row(*line, style=style)
    return made


def _result(outcome: Outcome) -> str:
    """Return the verdict in words, ``one input`` where it is the choice for those."""
    return f"{outcome.status}, one input" if outcome.single else outcome.status


def _gate(result: Optimized) -> tuple[str, float]:
    """Return what decides, in words, and its bound."""
    measured = next((o.measures for o in result.outcomes if o.measures), None)
    if not measured:
        return "min cosine", result.plan.min_cosine
    name = next(iter(measured))
    return MEASURES[name].label, result.plan.gate.get(name, MEASURES[name].bound or 0.0)


def _header(result: Optimized) -> tuple[str, ...]:
    named = {"min cosine": _gate(result)[0]}
    if result.plan.writes:
        named |= {"items/s": f"{result.plan.prefer} tok/s", "p50 ms": "ms a token"}
    return tuple(named.get(column, column) for column in HEADER)


def told(number: int, count: int, outcome: Outcome) -> str:
    """Return the line that says what became of a candidate when it was built."""
    if outcome.status in ("skipped", "dropped"):
        what = f"{outcome.status}: {outcome.reason}"
    else:
        what = "there already" if outcome.reused else f"built in {outcome.seconds:.0f} s"
    return f"{number}/{count} {outcome.candidate.label}: {what}"


def summary(result: Optimized) -> str:
    """Return one sentence: what was chosen, how fast and how right it is."""
    best = next((o for o in result.outcomes if o.status == "chosen"), None)
    if best is None or best.items_per_second is None:
        return "no candidate passed; auto stays as it was"
    times = f", {best.items_per_second / result.reference:.1f}x float32" if result.reference else ""
    unit = f"tok/s {result.plan.prefer}" if result.plan.writes else "items/s"
    threads = f" with {best.threads} of the threads" if best.threads else ""
    said = (
        f"chosen: {best.candidate.label}{threads}, {best.items_per_second:,.0f} {unit}{times}, "
        f"{_gate(result)[0]} {best.shown:.4f}, {best.bytes / 1e6:.1f} MB"
    )
    alone = next((o for o in result.outcomes if o.single), None)
    if alone is not None:
        said += (
            f"; for one input: {alone.candidate.label}, {alone.latency_ms_p50:.2f} ms, "
            f"{_gate(result)[0]} {alone.shown:.4f}"
        )
    told = [
        f"{placement} opened with {' '.join(f'{k}={v}' for k, v in options.items())}"
        for placement, options in result.plan.options.items()
        if options
    ]
    return "; ".join([said, *told])


def write_html(result: Optimized, target: Path) -> None:
    """Write the picture of the trade-off (quality against speed, bubble = size) and the table.

    Raises:
        MissingExtra: Altair is not installed.
    """
    order, plan = ranked(result.outcomes), result.plan
    points = [p for number, o in enumerate(order, 1) if (p := _point(number, o)) is not None]
    chart: list[Any] = ["<p>no candidate could be measured</p>"]
    if points:
        measure, bound = _gate(result)
        chart = [charts.tradeoff(points, "items per second", measure, gate=bound)]
    reference = f"{result.reference:,.0f} items/s" if result.reference else "not measured"
    numbered = [[number, *row] for number, row in enumerate(rows(result), 1)]
    styles = ["good" if outcome.single else STYLES[outcome.status] for outcome in order]
    html = pages.page(
        f"memopt optimize: {result.bundle.name}",
        {
            "model": plan.source,
            "date": result.at,
            "command": pages.command(),
            "calibration": plan.calibration,
        },
        [
            ("Quality against speed", [f"<p>{escape(summary(result))}</p>", *chart]),
            ("Candidates", [pages.table(("#", *_header(result)), numbered, styles=styles)]),
            ("Machine", [pages.table(("what", "value"), list(plan.machine.items()))]),
        ],
        note=" ".join(
            [
                f"Answers are compared with float32's on {result.inputs} inputs",
                "not used for calibration;",
                "below each a whisker to what other inputs are expected to keep, beside it the",
                "95 % interval of its speed;",
                f"portable float32 on ONNX Runtime gives {reference}.",
                f"{result.seconds:.0f} s in all.",
                *(f"{note}." for note in result.notes),
            ]
        ),
    )
    with atomic_path(target) as path:
        path.write_text(html, encoding="utf-8")


def _point(number: int, outcome: Outcome) -> charts.Point | None:
    """Return the bubble of an outcome, None where it was not measured."""
    speed, times = outcome.items_per_second, outcome.rounds_seconds
    if speed is None or outcome.shown is None:
        return None
    fast, slow = interval(times) if times else (1.0, 1.0)
    middle = median(times or (1.0,))
    return charts.Point(
        number=number,
        x=speed,
        y=outcome.shown,
        size=outcome.bytes,
        label=outcome.candidate.label,
        style=STYLES[outcome.status],
        x_low=speed * middle / slow,
        x_high=speed * middle / fast,
        y_low=outcome.cosine_low,
    )
