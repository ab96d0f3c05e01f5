"""What a job over a billion texts needs: a small simulator with every assumption named.

    python benchmarks/job_plan.py [--rows 1e9] [--rate 3700] [--workers 64] [--seed 0]

Fragments are handed out in order, two at a time, as memopt.jobs.crew does. A worker that dies does
its fragments again after it was opened anew; a slow one (a straggler) computes at a third of the
rate. Nothing is measured here: `--rate` is what benchmarks/job.py gave for one worker.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import dataclass

from command_line import positive_float, positive_int, run_main
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """All that is assumed."""

    rows: float = 1e9
    rate: float = 3700.0  # rows a second of one worker of two cores
    workers: int = 64
    fragment_rows: int = 100_000
    dimension: int = 384  # float32
    row_bytes: int = 80  # of source text and what is kept, compressed
    opening_seconds: float = 10.0  # of a worker, until its first row
    deaths_per_hour: float = 0.02  # of a worker: a spot machine that is taken every two days
    slow_share: float = 0.03  # workers that compute at a third of the rate
    request_bytes: int = 8 << 20  # read or written by one request to the object store
    commit_seconds: float = 0.005  # of one fragment, one after the other


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out."""

    hours: float
    ideal_hours: float
    deaths: int
    rows_again: float
    idle_share: float
    requests: float
    terabytes: float
    fragments: int


def simulate(given: Assumptions, seed: int) -> Outcome:
    """Return what one seeded run needs."""
    dice = random.Random(seed)
    fragments = -(-int(given.rows) // given.fragment_rows)
    slow = [dice.random() < given.slow_share for _ in range(given.workers)]
    free = [(given.opening_seconds, worker) for worker in range(given.workers)]
    heapq.heapify(free)
    left, deaths, again, busy, end = fragments, 0, 0.0, 0.0, 0.0
    committed = 0.0
    while left:
        now, worker = heapq.heappop(free)
        seconds = given.fragment_rows / given.rate * (3 if slow[worker] else 1)
        dies = dice.expovariate(1.0) / max(given.deaths_per_hour / 3600, 1e-12)
        if dies < seconds:
            deaths += 1
            again += given.fragment_rows * dies / seconds
            heapq.heappush(free, (now + dies + given.opening_seconds, worker))
            continue
        left -= 1
        busy += seconds
        # One process commits: where it cannot keep up, the workers wait for it.
        committed = max(committed, now + seconds) + given.commit_seconds
        end = max(end, committed)
        heapq.heappush(free, (now + seconds, worker))
    whole = given.rows * (given.row_bytes + 4 * given.dimension)
    return Outcome(
        hours=end / 3600,
        ideal_hours=given.rows / given.rate / given.workers / 3600,
        deaths=deaths,
        rows_again=again,
        idle_share=1 - busy / (end * given.workers),
        requests=whole / given.request_bytes + 2 * fragments,
        terabytes=whole / 1e12,
        fragments=fragments,
    )


def main() -> None:
    """Print one row a size of fragment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=positive_float, default=1e9)
    parser.add_argument("--rate", type=positive_float, default=3700.0)
    parser.add_argument("--workers", type=positive_int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    title = f"{asked.rows:.0e} rows, {asked.workers} workers of {asked.rate:,.0f} rows/s"
    table = Table(title=title)
    for column in ("rows a fragment", "fragments", "hours", "x ideal", "deaths", "rows done again"):
        table.add_column(column, justify="right")
    for column in ("idle", "requests", "TB"):
        table.add_column(column, justify="right")
    for size in (8_192, 32_768, 100_000, 1_000_000):
        given = Assumptions(
            rows=asked.rows, rate=asked.rate, workers=asked.workers, fragment_rows=size
        )
        found = simulate(given, asked.seed)
        table.add_row(
            f"{size:,}", f"{found.fragments:,}", f"{found.hours:.2f}",
            f"{found.hours / found.ideal_hours:.3f}", str(found.deaths),
            f"{found.rows_again:,.0f}", f"{found.idle_share:.1%}", f"{found.requests:,.0f}",
            f"{found.terabytes:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    run_main(main)
