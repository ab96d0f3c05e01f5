"""Jobs: every row once, the same bytes however often they were killed, here and on Ray."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lance
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memopt import ArrowEngine
from memopt.bundle import Bundle
from memopt.errors import ConfigurationError, InputError
from memopt.files import lock_plain
from memopt.jobs.embed import JobReport, embed_job

TEXTS = [f"a cat number {n} sleeps" for n in range(300)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path)
    return path


def run(source: Path, target: Path, minilm: Bundle, **options: Any) -> JobReport:
    options = {"fragment_rows": 64, "device": "cpu", **options}
    return embed_job(str(source), str(target), minilm.path, **options)


def parts(target: Path) -> dict[str, bytes]:
    return {str(p.relative_to(target)): p.read_bytes() for p in sorted(target.rglob("*.parquet"))}


def command(source: Path, target: Path, minilm: Bundle, *more: str) -> list[str]:
    own = [sys.executable, "-m", "memopt", "job", "embed", str(source), "-o", str(target)]
    return [*own, "-b", str(minilm.path), "--fragment-rows", "64", "--device", "cpu", *more]


def test_kills_lose_and_double_nothing(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """A worker that is killed, and a job that is killed three times: the bytes of a quiet run."""
    done = run(source, tmp_path / "whole", minilm)
    assert (done.rows, done.vectors, done.failures, done.fragments) == (300, 300, 0, 5)
    table = pq.read_table(tmp_path / "whole")
    assert table["index"].to_pylist() == list(range(300))
    assert table["text"].to_pylist() == TEXTS
    with ArrowEngine(minilm, device="cpu") as engine:
        expected = engine.encode(TEXTS)
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)

    def kill(rows: int, _: int) -> None:
        if rows == 64:
            psutil.Process().children()[-1].kill()

    killed = run(source, tmp_path / "worker", minilm, on_progress=kill)
    assert killed.restarts
    assert parts(tmp_path / "worker") == parts(tmp_path / "whole")
    dice = random.Random(0)
    for _ in range(3):
        running = subprocess.Popen(
            command(source, tmp_path / "job", minilm, "--resume"), start_new_session=True
        )
        try:
            running.wait(dice.uniform(0.8, 2.0))
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    last = command(source, tmp_path / "job", minilm, "--resume", "--json")
    report = json.loads(subprocess.run(last, check=True, capture_output=True).stdout)
    assert report["vectors"] == 300
    assert parts(tmp_path / "job") == parts(tmp_path / "whole")


def test_what_does_not_fit_is_refused(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """A second run, other settings, a destination that is there: one line each."""
    target = tmp_path / "out"
    assert run(source, target, minilm, dry_run=True).fragments == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.parquet"]
    home = tmp_path / "out.job"
    home.mkdir()
    lock = lock_plain(home / "lock")
    assert lock is not None
    with lock, pytest.raises(ConfigurationError, match="another process"):
        run(source, target, minilm)
    run(source, target, minilm)
    with pytest.raises(ConfigurationError, match="--resume"):
        run(source, target, minilm)
    with pytest.raises(InputError, match="another options"):
        run(source, target, minilm, resume=True, normalize=False)
    assert run(source, target, minilm, resume=True).resumed == 5
    with pytest.raises(ConfigurationError, match="choose local or ray"):
        run(source, tmp_path / "b", minilm, engine="dask")


def test_rows_that_fail_are_set_aside(tmp_path: Path, minilm: Bundle) -> None:
    """In a Lance data set the good ones, in a file the others with their reasons."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x"}\nbroken\n{"text": null}\n{"text": "y"}\n')
    done = run(path, tmp_path / "out.lance", minilm)
    assert (done.vectors, done.failures) == (2, 2)
    table = lance.dataset(str(tmp_path / "out.lance")).to_table()
    assert table["text"].to_pylist() == ["x", "y"]
    assert table["index"].to_pylist() == [0, 3]
    lines = (tmp_path / "out.lance.job" / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [1, 2]


def test_a_memory_store_is_filled_once(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """What is there already is left as it is."""
    first = run(source, tmp_path / "notes", minilm, to="memory", keep=["text"])
    assert first.stored == {"added": 300, "already": 0}


def test_ray_gives_the_same_bytes(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """Two actors of a real local Ray, one thread each, against two processes."""
    pytest.importorskip("ray")
    two = {"workers": 2, "threads": 1}
    run(source, tmp_path / "local", minilm, **two)
    run(source, tmp_path / "ray", minilm, engine="ray", **two)
    assert parts(tmp_path / "ray") == parts(tmp_path / "local")
