"""The queue: together, in turn, bounded, and nothing lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from memopt.errors import DeviceError
from memopt.runtimes.batcher import Batcher, Full


class Slow:
    """Doubles numbers, one batch at a time, and waits at a gate."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.gate.wait(10)
        return [2 * item for item in items]


def busy(batcher: Batcher, run: Slow) -> Future[Any]:
    """Put one item in work, so that what comes next waits."""
    first = batcher.submit("k", run, [0], [1], seconds=10)
    while not run.batches:
        time.sleep(0.001)
    return first


def test_what_waits_is_computed_together_and_each_gets_its_own() -> None:
    """Three requests that came during a batch are the next one."""
    batcher, run = Batcher(batch_tokens=100, queue_tokens=100), Slow()
    busy(batcher, run)
    futures = [batcher.submit("k", run, [i, 10 * i], [1, 1], seconds=10) for i in (1, 2, 3)]
    run.gate.set()
    assert [future.result(10).answers for future in futures] == [[2, 20], [4, 40], [6, 60]]
    assert run.batches == [[0], [1, 10, 2, 20, 3, 30]]
    batcher.close()


def test_a_small_request_does_not_wait_for_a_large_one_to_end() -> None:
    """Of 1,000 items and of one, the one is in the first batch of both."""
    batcher, run = Batcher(batch_tokens=200, queue_tokens=10_000), Slow()
    busy(batcher, run)
    large = batcher.submit("k", run, list(range(1000)), [1] * 1000, seconds=10)
    small = batcher.submit("k", run, [7], [1], seconds=10)
    run.gate.set()
    assert small.result(10).answers == [14]
    assert large.result(10).answers == [2 * i for i in range(1000)]
    assert 7 in run.batches[1][100:]
    assert max(len(batch) for batch in run.batches) <= 200
    batcher.close()


def test_other_settings_are_other_batches() -> None:
    """And the one that waited longest comes first."""
    batcher, run, other = Batcher(batch_tokens=100, queue_tokens=100), Slow(), Slow()
    busy(batcher, run)
    futures = [
        batcher.submit(key, verb, [number], [1], seconds=10)
        for number, (key, verb) in enumerate([("o", other), ("k", run), ("o", other)], start=1)
    ]
    run.gate.set()
    other.gate.set()
    assert [future.result(10).answers for future in futures] == [[2], [4], [6]]
    assert (run.batches, other.batches) == ([[0], [2]], [[1, 3]])
    batcher.close()


def test_too_much_is_refused_with_a_time_to_come_again() -> None:
    """With a time; what was let in is answered, and then there is room again."""
    batcher, run = Batcher(batch_tokens=10, queue_tokens=10), Slow()
    busy(batcher, run)
    waits = batcher.submit("k", run, [1], [8], seconds=10)
    with pytest.raises(Full, match="8 tokens wait") as refused:
        batcher.submit("k", run, [2], [8], seconds=10)
    assert refused.value.seconds >= 1
    run.gate.set()
    assert waits.result(10).answers == [2]
    assert batcher.submit("k", run, [2], [8], seconds=10).result(10).answers == [4]
    batcher.close()


def test_what_is_cancelled_or_late_is_not_computed() -> None:
    """Its room is free again, too."""
    batcher, run = Batcher(batch_tokens=100, queue_tokens=100), Slow()
    busy(batcher, run)
    late = batcher.submit("k", run, [1], [40], seconds=0.01)
    gone = batcher.submit("k", run, [2], [40], seconds=10)
    assert gone.cancel()
    time.sleep(0.05)
    run.gate.set()
    with pytest.raises(TimeoutError):
        late.result(10)
    assert batcher.submit("k", run, [3], [90], seconds=10).result(10).answers == [6]
    assert run.batches == [[0], [3]]
    batcher.close()


def test_a_failure_is_every_callers_and_the_queue_goes_on() -> None:
    """Also of a request whose other parts still wait."""

    def broken(items: Sequence[Any]) -> list[Any]:
        raise DeviceError("gone")

    batcher = Batcher(batch_tokens=2, queue_tokens=100)
    failing = batcher.submit("b", broken, [1, 2, 3, 4], [1] * 4, seconds=10)
    with pytest.raises(DeviceError, match="gone"):
        failing.result(10)
    assert batcher.submit("k", list, [5], [90], seconds=10).result(10).answers == [5]
    batcher.close()
    with pytest.raises(DeviceError, match="closed"):
        batcher.submit("k", list, [5], [1], seconds=10)


def test_nothing_is_lost_or_mixed_up_under_load() -> None:
    """Eight threads, requests of all sizes, some cancelled."""
    batcher = Batcher(batch_tokens=64, queue_tokens=100_000)

    def ask(seed: int) -> None:
        for turn in range(60):
            items = [seed * 10_000 + turn * 100 + i for i in range((seed * turn) % 97)]
            future = batcher.submit(
                turn % 2, negated, items, [1 + i % 5 for i in items], seconds=30
            )
            if turn % 7 == 3 and future.cancel():
                continue
            assert future.result(30).answers == [-item for item in items]

    def negated(items: Sequence[int]) -> list[int]:
        return [-item for item in items]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    batcher.close()
    assert batcher.waiting == 0
