"""Jobs: every row once, the same bytes whatever was killed, what cannot be encoded set aside."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memopt.bundle import Bundle
from memopt.errors import ConfigurationError, InputError
from memopt.jobs.embed import JobReport, embed_job
from memopt.runtimes.engine import ArrowEngine

ROWS = 400


def texts(count: int) -> list[str]:
    """Texts of many lengths, none like another."""
    return [f"number {i} " + "word " * (i % 37) for i in range(count)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table whose texts number 7 and 250 are none."""
    path = tmp_path_factory.mktemp("source") / "rows.parquet"
    column: list[str | None] = list(texts(ROWS))
    column[7] = column[250] = None
    pq.write_table(pa.table({"id": [f"r{i}" for i in range(ROWS)], "text": column}), path)
    return path


def run(source: Path, target: Path, bundle: Bundle, **options: Any) -> JobReport:
    """A job of fragments of 64 rows, on one graph."""
    how = {"fragment_rows": 64, "device": "cpu", "variant": "onnx-fp32-fused", **options}
    return embed_job(str(source), str(target), bundle.path, **how)


def parts(target: Path) -> dict[str, bytes]:
    """The bytes of every file of a destination."""
    return {p.name: p.read_bytes() for p in sorted(target.rglob("*")) if p.is_file()}


def test_every_row_is_encoded_or_set_aside(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """The vectors are the engine's, the other columns go along, the reasons are told."""
    report = run(source, tmp_path / "out", minilm)
    assert (report.rows, report.vectors, report.failures) == (ROWS, ROWS - 2, 2)
    lines = (tmp_path / "out.job" / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [7, 250]
    table = pq.read_table(tmp_path / "out")
    index = [i for i in range(ROWS) if i not in (7, 250)]
    assert table["index"].to_pylist() == index
    assert table["id"].to_pylist() == [f"r{i}" for i in index]
    with ArrowEngine(minilm, device="cpu", variant="onnx-fp32-fused") as engine:
        expected = engine.encode([texts(ROWS)[i] for i in index])
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), expected, atol=1e-5)


def test_two_workers_write_the_same_bytes(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """Whoever did which fragment; a dry run writes nothing."""
    run(source, tmp_path / "one", minilm, threads=1)
    run(source, tmp_path / "two", minilm, workers=2, threads=1)
    assert parts(tmp_path / "one") == parts(tmp_path / "two")
    report = run(source, tmp_path / "none", minilm, dry_run=True)
    assert (report.rows, report.fragments) == (ROWS, 7)
    assert not (tmp_path / "none").exists()


def test_lance_and_parquet_hold_the_same(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """A Lance data set is committed once, with all fragments."""
    import lance

    run(source, tmp_path / "out", minilm)
    run(source, tmp_path / "out.lance", minilm)
    data = lance.dataset(str(tmp_path / "out.lance"))
    assert len(data.versions()) == 1
    assert data.to_table().to_pydict() == pq.read_table(tmp_path / "out").to_pydict()


def test_a_memory_store_is_filled(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """And filled again it holds no row twice."""
    report = run(source, tmp_path / "store", minilm, to="memory")
    assert report.stored == {"added": ROWS - 2, "already": 0}


def test_kills_at_random_moments_change_nothing(
    source: Path, tmp_path: Path, minilm: Bundle
) -> None:
    """kill -9 of the whole job, then the same command with --resume: the same bytes."""
    run(source, tmp_path / "whole", minilm, threads=2)
    command = [sys.executable, "-m", "memopt", "job", "embed", str(source), "--resume"]
    command += ["--bundle", str(minilm.path), "-o", str(tmp_path / "out"), "--json"]
    command += ["--fragment-rows", "64", "--device", "cpu", "--variant", "onnx-fp32-fused"]
    command += ["--threads", "2"]
    dice, kills = random.Random(3), 0
    for _ in range(4):
        job = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            job.communicate(timeout=dice.uniform(0.8, 2.2))
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
            kills += 1
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert kills
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")


def test_a_worker_that_dies_is_replaced(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """Its fragments are done again, and the report says so."""
    killed: list[int] = []

    def on_progress(done: int, of: int) -> None:
        if not killed:
            worker = psutil.Process().children()[-1]
            killed.append(worker.pid)
            worker.kill()

    report = run(source, tmp_path / "out", minilm, fragment_rows=16, on_progress=on_progress)
    assert any("signal 9" in line for line in report.restarts)
    assert pq.read_table(tmp_path / "out")["index"].to_pylist() == [
        i for i in range(ROWS) if i not in (7, 250)
    ]


def test_a_second_job_at_the_same_time_is_refused(
    source: Path, tmp_path: Path, minilm: Bundle
) -> None:
    """And one that was begun is not begun anew by mistake, nor gone on with otherwise."""
    first = threading.Event()
    errors: list[Exception] = []

    def on_progress(done: int, of: int) -> None:
        if not first.is_set():
            first.set()
            time.sleep(0.2)
            try:
                run(source, tmp_path / "out", minilm, resume=True)
            except ConfigurationError as error:
                errors.append(error)

    run(source, tmp_path / "out", minilm, on_progress=on_progress)
    assert "another process is at work" in str(errors[0])
    with pytest.raises(ConfigurationError, match="begun"):
        run(source, tmp_path / "out", minilm)
    with pytest.raises((ConfigurationError, InputError), match=r"out"):
        run(source, tmp_path / "out", minilm, resume=True, normalize=False)
    assert run(source, tmp_path / "out", minilm, resume=True).resumed == 7


@pytest.mark.slow
def test_ray_writes_the_same_bytes(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """Two actors of a real Ray on this machine."""
    run(source, tmp_path / "local", minilm, threads=1)
    report = run(source, tmp_path / "ray", minilm, engine="ray", workers=2, threads=1)
    assert report.vectors == ROWS - 2
    assert parts(tmp_path / "ray") == parts(tmp_path / "local")
