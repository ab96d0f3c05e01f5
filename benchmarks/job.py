"""A job beside the engine alone, Ray beside local, and kills at random moments.

    python benchmarks/job.py [--bundle models/minilm] [--rows 20000] [--ray] [--kills 50]

The texts are short and seeded; all ways encode the same ones, in alternating rounds, so that a
ratio is of neighbours in time. What a job needs until its first worker is ready is a line of its
own: over 1,000,000 rows it is nothing, over 20,000 it would decide. `--kills` ends a job and all
its processes with SIGKILL at random moments and goes on with --resume, until it is through: the
parts must then be, byte for byte, those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from command_line import nonnegative_int, positive_int, run_main

from memopt import open_bundle
from memopt.benchmark.workload import default_inputs
from memopt.jobs.embed import JobReport, embed_job
from memopt.runtimes.configured import open_engine

Way = Callable[[], tuple[float, float]]  # seconds of work, and until it began


def engine_alone(bundle: str, texts: list[str]) -> Way:
    """One engine in this process, opened before; the vectors go nowhere."""
    engine = open_engine(bundle)
    engine.encode(texts[:2000])

    def run() -> tuple[float, float]:
        begin = time.perf_counter()
        engine.encode(texts)
        return time.perf_counter() - begin, 0.0

    return run


def job(bundle: str, source: Path, folder: Path, **options: Any) -> Way:
    """A whole job, read from Parquet and written to it."""

    def run() -> tuple[float, float]:
        home = Path(tempfile.mkdtemp(dir=folder))
        begin, commits = time.perf_counter(), [0.0]
        report: JobReport = embed_job(
            str(source), str(home / "out"), bundle,
            on_progress=lambda *_: commits.append(time.perf_counter() - begin), **options,
        )  # fmt: skip
        shutil.rmtree(home)
        # To the last commit: Ray takes more than a second to shut down.
        return commits[-1] - report.opening, report.opening

    return run


def compare(ways: dict[str, Way], rows: int, rounds: int) -> None:
    """Print rows per second of each way and the ratio to the first one, of paired rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    opening: dict[str, float] = {}
    for turn in range(rounds):
        for name in list(ways) if turn % 2 == 0 else reversed(list(ways)):
            work, opening[name] = ways[name]()
            seconds[name].append(work)
    first = next(iter(ways))
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[first], times, strict=True)]
        print(
            f"{name:36} {rows / statistics.median(times):8.0f} rows/s   {opening[name]:5.1f} s to "
            f"open   {statistics.median(ratios):.3f} of {first} "
            f"[{min(ratios):.3f}, {max(ratios):.3f}]",
            flush=True,
        )


def command(bundle: str, source: Path, target: Path, *more: str) -> list[str]:
    """Return the command line of a job."""
    own = [sys.executable, "-m", "memopt", "job", "embed", str(source), "-o", str(target)]
    return [*own, "--bundle", bundle, "--fragment-rows", "256", "--json", *more]


def kill_at_random(bundle: str, rows: int, kills: int, folder: Path, *more: str) -> None:
    """Kill a job ``kills`` times, as often begun anew as that takes, and compare the bytes."""
    source = folder / "killed.parquet"
    write(source, default_inputs(open_bundle(bundle).manifest, rows))
    subprocess.run(
        command(bundle, source, folder / "whole", *more), check=True, capture_output=True
    )
    whole = hashes(folder / "whole.job")
    dice, left, finished = random.Random(0), kills, 0
    begin = time.perf_counter()
    while left:
        target = folder / f"killed-{finished}"
        while True:
            running = subprocess.Popen(
                command(bundle, source, target, "--resume", *more),
                start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            try:
                _, told = running.communicate(timeout=dice.uniform(0.3, 6.0) if left else None)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.communicate()
                left -= 1
                continue
            if running.returncode:
                raise SystemExit(told.decode())
            break
        finished += 1
        if hashes(folder / f"killed-{finished - 1}.job") != whole:
            raise SystemExit(f"{target} has other bytes")
        index = pq.read_table(target, columns=["index"])["index"].to_pylist()
        if index != list(range(rows)):
            raise SystemExit(f"{target} has lost or doubled rows")
        shutil.rmtree(target)
        shutil.rmtree(folder / f"killed-{finished - 1}.job")
    print(
        f"{kills} kills at random moments of {finished} jobs of {rows} rows: 0 rows lost or "
        f"doubled, all bytes the same ({time.perf_counter() - begin:.0f} s)"
    )


def hashes(home: Path) -> list[str]:
    """Return the hash of every part of a job."""
    manifest = json.loads((home / "manifest.json").read_text())
    return [part["sha256"] for part in manifest["parts"]]


def write(path: Path, texts: list[str]) -> None:
    """Write texts as a Parquet file, with an id each."""
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", default="models/minilm")
    parser.add_argument("--rows", type=nonnegative_int, default=20_000, help="0: only --kills")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--two", action="store_true", help="also two workers of one thread")
    parser.add_argument("--ray", action="store_true", help="also actors of a local Ray")
    parser.add_argument("--kills", type=nonnegative_int, default=0)
    arguments = parser.parse_args()
    bundle = str(open_bundle(arguments.bundle).path.absolute())
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        if arguments.rows:
            texts = default_inputs(open_bundle(bundle).manifest, arguments.rows)
            source = folder / "texts.parquet"
            write(source, texts)
            ways = {"the engine alone": engine_alone(bundle, texts)}
            ways["local, 1 worker"] = job(bundle, source, folder)
            if arguments.two:
                two = {"workers": 2, "threads": 1}
                ways["local, 2 workers of 1 thread"] = job(bundle, source, folder, **two)
            if arguments.ray:
                ways["ray, 1 actor"] = job(bundle, source, folder, engine="ray")
            compare(ways, arguments.rows, arguments.rounds)
        if arguments.kills:
            kill_at_random(bundle, 4096, arguments.kills, folder)


if __name__ == "__main__":
    run_main(main)
