"""A sample of the sweep over transformers' model types: it measures, and what it finds is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
SAMPLE = {
    "albert": "right",
    "mobilenet_v2": "right",
    "hubert": "right",
    "detr": "refused",
    "timesfm": "refused",
    "llava": "refused",
}


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(900)
def test_a_sample_of_model_types_is_right_or_refused_in_one_line(tmp_path: Path) -> None:
    """The rows of a run say it, and so does its exit code."""
    command = [sys.executable, SWEEP, "-o", tmp_path, "-j", "2", *SAMPLE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    found = {row["type"]: (row["status"], "\n" in row["line"]) for row in rows}
    assert found == {kind: (status, False) for kind, status in SAMPLE.items()}
