"""Killed builders, writers at the same time, a full disk: nothing acknowledged is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from memopt.memory.lifecycle.verify import Report, verify
from memopt.memory.memory_store import MemoryStore
from tests.memory import memory_worker
from tests.memory.memory_worker import DIM

# 30 for the whole soak; a few seconds in the suite.
SOAK_SECONDS = float(os.environ.get("MEMOPT_SOAK_SECONDS", "3"))


def start(role: str, folder: Path, seed: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, memory_worker.__file__, role, str(folder), str(seed)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1 << 20
    )


def said(process: subprocess.Popen[str]) -> list[list[str]]:
    """The whole lines of a process that has ended, but for those read already."""
    assert process.stdout is not None
    # Not communicate(), which passes by what readline() has buffered.
    lines = process.stdout.readlines()
    process.wait()
    return [line.split() for line in lines if line.endswith("\n")]


def ids_of(lines: list[list[str]], word: str) -> set[str]:
    return {key for line in lines if line[:1] == [word] for key in line[1:]}


def checked(store: MemoryStore, expected: set[str]) -> Report:
    """What a crash may leave is repaired; after that there is nothing to find."""
    first = verify(store, sorted(expected))
    assert not first.missing
    assert not first.duplicates
    assert not first.unreadable
    assert not first.orphans
    return verify(store, sorted(expected), repair=True)


@pytest.mark.parametrize("delay", [0.05, 0.4])
def test_killed_while_the_index_is_built(tmp_path: Path, delay: float) -> None:
    """The memories are there, searches are right, and the next build succeeds."""
    process = start("build", tmp_path)
    assert process.stdout is not None
    added = process.stdout.readline().split()[1:]
    assert process.stdout.readline() == "building\n"
    time.sleep(delay)
    process.kill()
    process.communicate()
    store = MemoryStore(tmp_path, background=False)
    assert not checked(store, set(added)).problems
    ids, vectors = store.vectors()
    query = vectors[7]
    exact = {ids[at] for at in np.argsort(-(vectors @ query))[:10]}
    assert len(exact & {key for key, _ in store.candidates(query, top_k=10)}) >= 9
    state = store.index.ensure(rebuild=True)
    assert state is not None
    assert state.recall >= 0.95


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    """One writer is killed at the end, in whatever it does then."""
    MemoryStore(tmp_path, dim=DIM).close()
    writers = [start("write", tmp_path, seed) for seed in (1, 2)]
    reader = start("read", tmp_path, 3)
    # On a busy machine the clock starts late: all three must have been at work.
    first = [_lines(process, 5) for process in (*writers, reader)]
    time.sleep(SOAK_SECONDS)
    still_alive = [process.poll() is None for process in (*writers, reader)]
    for process in (*writers, reader):
        process.kill()
    lines = [
        begun + said(process) for begun, process in zip(first, (*writers, reader), strict=True)
    ]
    assert still_alive == [True, True, True], [p.stderr for p in (*writers, reader)]
    added = [ids_of(part, "added") for part in lines[:2]]
    assert all(len(part) >= 32 for part in added)
    assert sum(line[0] == "found" for line in lines[2]) >= 5
    # What was being deleted at the end may be there or not.
    expected = (added[0] | added[1]) - ids_of(lines[0] + lines[1], "deleting")
    with MemoryStore(tmp_path) as store:
        report = checked(store, expected)
        assert not report.problems
        finished = set()
        for part in lines[:2]:
            orders = [line for line in part if line[0] != "found"]
            for order, after in pairwise(orders):
                if order[0] == "deleting" and after[0] == "added":
                    finished |= set(order[1:])
        there = {
            key
            for batch in store.scan(columns=["memory_id"])
            for key in batch["memory_id"].to_pylist()
        }
        assert not finished & there
        assert there <= added[0] | added[1] | _unacknowledged(there, added)


def _lines(process: subprocess.Popen[str], count: int) -> list[list[str]]:
    """The first lines of a process that goes on."""
    assert process.stdout is not None
    return [process.stdout.readline().split() for _ in range(count)]


def _unacknowledged(there: set[str], added: list[set[str]]) -> set[str]:
    """At most one commit of each writer was stored and not yet said."""
    unsaid = there - added[0] - added[1]
    assert len(unsaid) <= 32
    return unsaid


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing_and_goes_on_with_room(small_disk: Path) -> None:
    """One clear line, every acknowledged memory readable, and with more room the same again."""
    first = start("fill", small_disk / "store")
    lines = said(first)
    assert first.returncode == 0, first.stderr
    assert lines[-1][0] == "full"
    assert "full" in lines[-1][1:] or "space" in " ".join(lines[-1])
    added = ids_of(lines, "added")
    assert added
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    with MemoryStore(small_disk / "store") as store:
        assert not checked(store, added).problems
        more = store.add(memory_worker.memories(10_000_000, 8, 9)).ids
        assert len(store.get_many(more)) == 8
