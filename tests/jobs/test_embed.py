"""Jobs: every row once, the same bytes whatever was killed, what cannot be encoded set aside."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import lance
import numpy as np
import pyarrow.parquet as pq
import pytest

from memopt import ArrowEngine
from memopt.bundle import Bundle
from memopt.errors import ConfigurationError, InputError
from tests.jobs.kit import KEPT, NONE, ROWS, command, parts, run, worker


def test_every_row_is_encoded_or_set_aside(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """The vectors are the engine's, the other columns go along; in Lance as in Parquet."""
    report = run(source, tmp_path / "out", minilm)
    assert (report.rows, report.vectors, report.failures) == (ROWS, len(KEPT), len(NONE))
    table = pq.read_table(tmp_path / "out")
    assert table["index"].to_pylist() == KEPT
    assert table["id"].to_pylist() == [f"r{i}" for i in KEPT]
    with ArrowEngine(minilm, device="cpu", variant="onnx-fp32-fused") as engine:
        expected = engine.encode(table["text"].to_pylist())
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), expected, atol=1e-5)
    run(source, tmp_path / "out.lance", minilm)
    data = lance.dataset(str(tmp_path / "out.lance"))
    assert len(data.versions()) == 1
    assert data.to_table().to_pydict() == table.to_pydict()


def test_the_reasons_are_told(tmp_path: Path, minilm: Bundle) -> None:
    """A line a row that is not among the vectors."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x"}\nbroken\n{"text": null}\n{"text": "y"}\n')
    done = run(path, tmp_path / "out", minilm)
    assert (done.vectors, done.failures) == (2, 2)
    table = pq.read_table(tmp_path / "out")
    assert table.select(["text", "index"]).to_pydict() == {"text": ["x", "y"], "index": [0, 3]}
    lines = (tmp_path / "out.job" / "failures.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert [line["index"] for line in told] == [1, 2]
    assert told[0]["reason"].startswith("is not JSON")


def test_two_workers_write_the_same_bytes(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """Whoever did which fragment."""
    run(source, tmp_path / "one", minilm)
    run(source, tmp_path / "two", minilm, workers=2)
    assert parts(tmp_path / "one") == parts(tmp_path / "two")


def test_a_memory_store_is_filled_once(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """What is there already is left as it is, also by another job."""
    first = run(source, tmp_path / "notes", minilm, to="memory")
    assert first.stored == {"added": len(KEPT), "already": 0}
    shutil.rmtree(tmp_path / "notes.job")
    second = run(source, tmp_path / "notes", minilm, to="memory")
    assert second.stored == {"added": 0, "already": len(KEPT)}


def test_kills_at_random_moments_change_nothing(
    source: Path, tmp_path: Path, minilm: Bundle
) -> None:
    """kill -9 of the whole job, then the same command with --resume: the same bytes."""
    run(source, tmp_path / "whole", minilm)
    dice, kills = random.Random(3), 0
    again = command(source, tmp_path / "out", minilm, "--resume", "--json")
    for _ in range(4):
        job = subprocess.Popen(
            again, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            job.communicate(timeout=dice.uniform(0.8, 2.2))
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
            kills += 1
    done = subprocess.run(again, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert kills
    assert json.loads(done.stdout)["vectors"] == len(KEPT)
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")


def test_a_worker_that_dies_is_replaced(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """Its fragments are done again, and the report says so."""
    killed: list[int | None] = []

    def on_progress(done: int, of: int) -> None:
        if not killed:
            victim = worker()
            killed.append(victim.pid)
            victim.kill()

    report = run(source, tmp_path / "out", minilm, on_progress=on_progress)
    assert any("signal 9" in line for line in report.restarts)
    run(source, tmp_path / "whole", minilm)
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")


def test_what_does_not_fit_is_refused(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """A second job at the same time, one begun, other options, a place taken: one line each."""
    target = tmp_path / "out"
    assert run(source, target, minilm, dry_run=True).fragments == 5
    assert not list(tmp_path.iterdir())
    first = threading.Event()
    errors: list[Exception] = []

    def on_progress(done: int, of: int) -> None:
        if not first.is_set():
            first.set()
            try:
                run(source, target, minilm, resume=True)
            except ConfigurationError as error:
                errors.append(error)

    run(source, target, minilm, on_progress=on_progress)
    assert "another process is at work" in str(errors[0])
    with pytest.raises(ConfigurationError, match="begun"):
        run(source, target, minilm)
    with pytest.raises(InputError, match="another options"):
        run(source, target, minilm, resume=True, normalize=False)
    assert run(source, target, minilm, resume=True).resumed == 5
    shutil.rmtree(tmp_path / "out.job")
    with pytest.raises(ConfigurationError, match="is there already"):
        run(source, target, minilm, resume=True)
    with pytest.raises(ConfigurationError, match="choose local or ray"):
        run(source, tmp_path / "b", minilm, engine="dask")
