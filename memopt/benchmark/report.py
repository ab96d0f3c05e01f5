"""A benchmark run as a rich table and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memopt import charts, pages
from memopt.benchmark import profile
from memopt.benchmark.record import BenchmarkMetrics, interval, ratio
from memopt.files import atomic_path
from memopt.runtimes.profile import Profile
from memopt.tasks.quality import MEASURES

HEADER = (
    "contender",
    "items/s",
    "vs first",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "load s",
    "first vector s",
    "RSS MB",
    "model RSS MB",
    "cosine min",
)


def header(records: Sequence[BenchmarkMetrics]) -> tuple[str, ...]:
    """Return the columns of a run; GPU memory only where a GPU was used."""
    measure = next(iter(records[0].measures), None)
    named = (*HEADER[:-1], MEASURES[measure].label) if measure else HEADER
    return named if not _on_gpu(records) else (*named, "VRAM MB")


def _on_gpu(records: Sequence[BenchmarkMetrics]) -> bool:
    return any(record.vram_mb for record in records)


def rows(records: Sequence[BenchmarkMetrics]) -> list[list[str]]:
    """Return one row of formatted cells per record, ratios against the first record."""
    reference = records[0]
    lines = []
    for record in records:
        against = ratio(record, reference)
        lines.append(
            [
                record.label,
                f"{record.items_per_second:,.0f}",
                f"{against.median:.2f}x [{against.low:.2f}, {against.high:.2f}]",
                f"{record.latency_ms_p50:.2f}",
                f"{record.latency_ms_p95:.2f}",
                f"{record.latency_ms_p99:.2f}",
                f"{record.load_seconds:.2f}",
                f"{record.first_vector_seconds:.2f}",
                f"{record.rss_mb:.0f}",
                f"{record.rss_increase_mb:.0f}",
                "-" if record.nearness is None else f"{record.nearness:.5f}",
            ]
        )
        if _on_gpu(records):
            lines[-1].append(f"{record.vram_mb or 0:.0f}")
    return lines


def table(records: Sequence[BenchmarkMetrics]) -> Any:
    """Return a rich table of a run, cosines against its reference."""
    from rich.table import Table

    reference = records[0].reference
    made = Table(
        *header(records),
        title=f"{records[0].items} inputs, medians of paired rounds"
        + (f", answers against {reference}" if reference else ""),
    )
    for line in rows(records):
        made.add_row(*line)
    return made


def answering(records: Sequence[BenchmarkMetrics]) -> list[str]:
    """Return a line for each contender that was left to choose: what answered."""
    lines = []
    for record in records:
        if record.spec.get("variant") == "auto" and record.variants:
            told = ", ".join(f"{what} by {name}" for what, name in record.variants.items())
            several = f"; compared are {record.compared}'s" if len(record.variants) > 1 else ""
            lines.append(f"{record.label}: {told}{several}")
    return lines


def circumstances(records: Sequence[BenchmarkMetrics]) -> list[tuple[str, str]]:
    """Return what was measured on and with; a package of several versions names them all."""
    found = {name: [str(value)] for name, value in records[0].hardware.items()}
    for record in records:
        for name, version in record.versions.items():
            known = found.setdefault(name, [])
            if version not in known:
                known.append(version)
    return [(name, ", ".join(values)) for name, values in found.items()]


def write_html(
    records: Sequence[BenchmarkMetrics], target: Path, profiles: Sequence[Profile] = ()
) -> None:
    """Write the run as one HTML file with bar charts, the table and the circumstances.

    Args:
        profiles: where the time of one input goes, a picture and a table more.

    Raises:
        MissingExtra: Altair is not installed.
    """
    best = max(records, key=lambda r: r.items_per_second).label
    single = min(records, key=lambda r: r.latency_ms_p50).label

    def style(record: BenchmarkMetrics, highlight: str | None) -> str:
        if record.label == highlight:
            return "good"
        return "bar" if record.spec.get("kind") == "memopt" else "soft"

    def chart(field: str, unit: str, highlight: str | None = None) -> list[object]:
        bars = [
            charts.Bar(label=r.label, value=getattr(r, field), style=style(r, highlight))
            for r in records
        ]
        if field == "items_per_second":
            times = [interval(record.rounds_seconds) for record in records]
            bars = [
                replace(bar, low=record.items / slow, high=record.items / fast)
                for bar, record, (fast, slow) in zip(bars, records, times, strict=True)
            ]
        return [charts.bars(bars, unit)]

    cut: list[tuple[str, list[object]]] = []
    if profiles:
        told = pages.table(profile.HEADER, profile.rows(profiles))
        cut = [("Where one input's time goes", [profile.chart(profiles), told])]
    first = records[0]
    models = dict.fromkeys(Path(r.spec["path"]).name for r in records if "path" in r.spec)
    html = pages.page(
        "memopt benchmark",
        {
            "model": ", ".join(models),
            "date": first.at,
            "command": pages.command(),
            "inputs": f"{first.items} of {first.inputs or 'seeded ones'}",
        },
        [
            ("Throughput", chart("items_per_second", "items/s", best)),
            ("Single input, p50", chart("latency_ms_p50", "ms", single)),
            *cut,
            ("Opening, until the first vector", chart("first_vector_seconds", "s")),
            ("Resident memory after the run", chart("rss_mb", "MB")),
            ("Numbers", [pages.table(header(records), rows(records))]),
            ("Machine and versions", [pages.table(("what", "value"), circumstances(records))]),
        ],
        note=(
            f"{len(first.rounds_seconds)} alternating rounds; whiskers are 95 % bootstrap "
            "intervals of the median, ratios medians of paired rounds with theirs, against the "
            f"first row; cosines are against {first.reference or 'the first row'}."
            + "".join(f" {line}." for line in answering(records))
        ),
    )
    with atomic_path(target) as path:
        path.write_text(html, encoding="utf-8")
