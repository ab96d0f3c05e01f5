"""The outcome of ``memopt optimize`` as a rich table and as one picture of the trade-off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt import charts
from memopt.files import atomic_path

if TYPE_CHECKING:
    from memopt.optimize.run import Optimized, Outcome

HEADER = (
    "candidate",
    "device",
    "result",
    "min cosine",
    "mean",
    "items/s",
    "p50 ms",
    "MB",
    "why",
)
_STYLES = {"chosen": "good", "kept": "bar", "dropped": "bad"}


def rows(outcomes: tuple[Outcome, ...]) -> list[list[str]]:
    """Return one row of formatted cells per candidate, fastest first, unmeasured ones last."""

    def number(value: float | None, pattern: str) -> str:
        return "-" if value is None else format(value, pattern)

    ranked = sorted(outcomes, key=lambda o: -(o.items_per_second or 0.0))
    return [
        [
            outcome.candidate.name + (" (reused)" if outcome.reused else ""),
            outcome.candidate.device,
            outcome.status,
            number(outcome.cosine_min, ".4f"),
            number(outcome.cosine_mean, ".5f"),
            number(outcome.items_per_second, ",.0f"),
            number(outcome.latency_ms_p50, ".2f"),
            f"{outcome.bytes / 1e6:.1f}" if outcome.bytes else "-",
            outcome.reason,
        ]
        for outcome in ranked
    ]


def table(result: Optimized) -> Any:
    """Return a rich table of the outcomes."""
    from rich.table import Table

    made = Table(
        *HEADER, title=f"{result.inputs} inputs, gate: min cosine {result.plan.min_cosine}"
    )
    for line in rows(result.outcomes):
        made.add_row(*line)
    return made


def write_html(result: Optimized, target: Path) -> None:
    """Write the Pareto picture (quality against speed, bubble = size) and the table."""
    points = [
        charts.Point(
            x=outcome.items_per_second,
            y=outcome.cosine_min,
            size=outcome.bytes,
            label=outcome.candidate.name,
            style=_STYLES.get(outcome.status, "bar"),
        )
        for outcome in result.outcomes
        if outcome.items_per_second is not None and outcome.cosine_min is not None
    ]
    picture = (
        charts.scatter(points, "items per second", "min cosine", gate=result.plan.min_cosine)
        if points
        else "<p>no candidate could be measured</p>"
    )
    html = charts.page(
        f"memopt optimize: {result.bundle.name}",
        [
            ("Quality against speed, bubble = size on disk", picture),
            ("Candidates", charts.table(HEADER, rows(result.outcomes))),
            ("Machine", charts.table(("what", "value"), list(result.plan.machine.items()))),
        ],
        note=(
            f"chosen: {result.plan.chosen}; cosines are against float32 on {result.inputs} inputs "
            f"not used for calibration; {result.seconds:.0f} s in all"
        ),
    )
    with atomic_path(target) as path:
        path.write_text(html, encoding="utf-8")
