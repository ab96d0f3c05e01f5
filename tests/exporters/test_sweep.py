"""A sample of the sweep over transformers' model types: it measures, and what it finds is right."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
REFUSED = ("timesfm", "llava")
SAMPLED = 4


def _right() -> list[tuple[str, str]]:
    """Return the pairs of type and task that docs/coverage.md says are right on both formats."""
    rows = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines()]
    both = (row for row in rows if row[2:4] == ["yes", "yes"])
    return [(row[0].removesuffix(" \\*"), row[1]) for row in both]


def _sample() -> list[tuple[str, str]]:
    """Return pairs of this ISO week: over a year all of them have their turn."""
    year, week, _ = datetime.date.today().isocalendar()
    pairs = _right()
    start = (year * 53 + week) * SAMPLED
    return [pairs[(start + i) % len(pairs)] for i in range(SAMPLED)]


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_a_sample_of_model_types_is_right_or_refused_in_one_line(tmp_path: Path) -> None:
    """The rows of a run say it, and so does its exit code."""
    wanted = dict.fromkeys(_sample(), "right") | {(k, "embedding"): "refused" for k in REFUSED}
    for kind, task in wanted:
        asked = "embedding" if task.endswith("embedding") else task
        command = [sys.executable, SWEEP, "-o", tmp_path, "--task", asked, kind]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    found = {(row["type"], row["task"]): (row["status"], "\n" in row["line"]) for row in rows}
    assert found == {pair: (status, False) for pair, status in wanted.items()}
