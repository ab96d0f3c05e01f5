"""Too little memory: batches are halved and the job goes on, under a limit that the system sets."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memopt.bundle import Bundle
from memopt.jobs.embed import embed_job
from tests.jobs.kit import worker

ROWS = 64
# One layer's attention scores of all rows at once: 12 heads of 256 x 256 float32.
SCORES = ROWS * 12 * 256 * 256 * 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
@pytest.mark.parametrize("variant", ["onnx-fp32-fused", "openvino-fp32"])
def test_too_little_memory_halves_batches(
    variant: str, tmp_path: Path, minilm: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What row by row needs, and half of what one layer of a batch of all rows needs."""
    # Each thread's own would take of the address space by chance.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    source = tmp_path / "rows.parquet"
    # All as long as the model takes, so that a batch is as large as its rows are many.
    pq.write_table(pa.table({"text": [f"{i} " + "word " * 250 for i in range(ROWS)]}), source)
    peaks = []

    def on_progress(done: int, of: int) -> None:
        status = Path(f"/proc/{worker().pid}/status").read_text()
        peaks.append(int(status.split("VmPeak:")[1].split()[0]) << 10)

    options: dict[str, Any] = {"variant": variant, "on_progress": on_progress}
    embed_job(str(source), str(tmp_path / "single"), minilm.path, batch_size=1, **options)
    limit = max(peaks) + SCORES // 2
    done = subprocess.run(
        [
            *(sys.executable, "-m", "memopt", "job", "embed", str(source), "--json"),
            *("-o", str(tmp_path / "out"), "-b", str(minilm.path)),
            *("--variant", variant, "--batch-size", str(ROWS)),
        ],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["vectors"] == ROWS
    assert any("halved" in line for line in (*report["events"], *report["restarts"])), report
    table, expected = pq.read_table(tmp_path / "out"), pq.read_table(tmp_path / "single")
    assert table.drop_columns("vector") == expected.drop_columns("vector")
    vectors = [np.array(t["vector"].to_pylist(), np.float32) for t in (table, expected)]
    np.testing.assert_allclose(*vectors, atol=1e-5)
