"""A benchmark run as a rich table and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memopt import charts
from memopt.benchmark.record import BenchmarkMetrics, ratio
from memopt.files import atomic_path

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
    return HEADER if not _on_gpu(records) else (*HEADER, "VRAM MB")


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
                "-" if record.cosine_min is None else f"{record.cosine_min:.5f}",
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
        + (f", cosine against {reference}" if reference else ""),
    )
    for line in rows(records):
        made.add_row(*line)
    return made


def circumstances(records: Sequence[BenchmarkMetrics]) -> list[tuple[str, str]]:
    """Return what was measured on and with; a package of several versions names them all."""
    found = {name: [str(value)] for name, value in records[0].hardware.items()}
    for record in records:
        for name, version in record.versions.items():
            known = found.setdefault(name, [])
            if version not in known:
                known.append(version)
    return [(name, ", ".join(values)) for name, values in found.items()]


def write_html(records: Sequence[BenchmarkMetrics], target: Path) -> None:
    """Write the run as one HTML file with bar charts, the table and the circumstances."""
    best = max(records, key=lambda r: r.items_per_second).label
    single = min(records, key=lambda r: r.latency_ms_p50).label
    peers = {record.label for record in records if record.spec.get("kind") != "memopt"}

    def chart(field: str, unit: str, highlight: str | None = None) -> str:
        values = [(record.label, float(getattr(record, field))) for record in records]
        return charts.bars(values, unit, highlight=highlight, muted=peers)

    sections = [
        ("Throughput", chart("items_per_second", "items/s", best)),
        ("Single input, p50", chart("latency_ms_p50", "ms", single)),
        ("Opening, until the first vector", chart("first_vector_seconds", "s")),
        ("Resident memory after the run", chart("rss_mb", "MB")),
        ("Numbers", charts.table(header(records), rows(records))),
        ("Machine and versions", charts.table(("what", "value"), circumstances(records))),
    ]
    html = charts.page(
        "memopt benchmark",
        sections,
        note=(
            f"{records[0].items} inputs, {len(records[0].rounds_seconds)} alternating rounds; "
            "ratios are medians of paired rounds with a 95 % bootstrap interval, against the "
            "first row; "
            f"cosines are against {records[0].reference or 'the first row'}."
        ),
    )
    with atomic_path(target) as path:
        path.write_text(html, encoding="utf-8")
