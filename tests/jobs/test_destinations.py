"""Vectors on an object store, over HTTP: whole, once, the same bytes after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import lance
import pytest

from memopt.bundle import Bundle
from memopt.errors import ConfigurationError
from memopt.jobs.destinations import open_destination
from tests.jobs.kit import command, parts, run
from tests.memory.s3_server import Bucket, s3_server


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A store, and a folder of now for the jobs' folders."""
    monkeypatch.chdir(tmp_path)
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.environment["AWS_ENDPOINT"])
        # The server here takes bodies as they are, without trailers of checksums.
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        yield server


def stored(bucket: Bucket, place: str) -> dict[str, bytes]:
    """Return the objects with vectors below a place."""
    below = f"{place.removeprefix('s3://')}/"
    objects = {k.removeprefix(below): v for k, v in bucket.objects.items() if k.startswith(below)}
    return {k: v for k, v in objects.items() if k.endswith((".parquet", ".lance"))}


@pytest.mark.parametrize("name", ["vectors", "vectors.lance"])
def test_a_kill_changes_nothing_on_an_object_store(
    name: str, bucket: Bucket, source: Path, tmp_path: Path, minilm: Bundle
) -> None:
    """Killed when two of five parts are there, gone on with, and ended twice."""
    run(source, tmp_path / "local" / name, minilm)
    place = f"s3://data/{name}"
    job = subprocess.Popen(command(source, place, minilm), start_new_session=True)
    try:
        while len(stored(bucket, place)) < 2:
            assert job.poll() is None
            time.sleep(0.005)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert not any("_SUCCESS" in path or "_versions" in path for path in bucket.objects)
    report = run(source, place, minilm, resume=True)
    assert (report.destination, report.job) == (place, str(tmp_path / f"{name}.job"))
    assert stored(bucket, place) == parts(tmp_path / "local" / name)
    # As if killed before it was noted that all is done.
    (tmp_path / f"{name}.job" / "manifest.json").unlink()
    assert run(source, place, minilm, resume=True).resumed == 5
    assert stored(bucket, place) == parts(tmp_path / "local" / name)
    if name == "vectors":
        assert f"data/{name}/_SUCCESS" in bucket.objects
    else:
        local = lance.dataset(str(tmp_path / "local" / name))
        assert lance.dataset(place).to_table() == local.to_table()
        assert len(lance.dataset(place).versions()) == 1


def test_what_cannot_be_written_is_one_line(
    bucket: Bucket, source: Path, tmp_path: Path, minilm: Bundle
) -> None:
    """A place that is taken, one of this process alone, one that may only be read."""
    bucket.objects["data/taken/rows.csv"] = b"text"
    for place in ("s3://data/taken", "memory://rows"):
        with pytest.raises(ConfigurationError, match=r"is there already|one process"):
            run(source, place, minilm)
    bucket.read_only = True
    with pytest.raises(ConfigurationError, match="cannot be written"):
        run(source, "s3://data/locked", minilm)


def test_an_url_of_this_machine_is_a_path(tmp_path: Path) -> None:
    """And its job's folder is beside it."""
    destination = open_destination(f"{tmp_path.as_uri()}/rows", "auto")
    assert destination.place == str(tmp_path / "rows")
    assert destination.home == tmp_path / "rows.job"
