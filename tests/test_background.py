"""Work beside the caller: once at a time, told of errors, waited for, not in a forked child."""

from __future__ import annotations

import os
import threading
import time

import pytest

from memopt.background import BackgroundTask


def test_it_runs_once_at_a_time_and_close_waits_for_it() -> None:
    """Calls for it while it is at work start no second one."""
    go, done = threading.Event(), []

    def work() -> None:
        go.wait(10)
        done.append(threading.current_thread().name)

    task = BackgroundTask(work, "example", on_error=done.append)
    task.start()
    task.start()
    assert task.busy
    go.set()
    task.close()
    assert done == ["example"]
    task.start()
    task.close()
    assert done == ["example", "example"]


def test_an_error_is_told_and_the_next_call_works() -> None:
    """on_error is told, in the thread and here and now."""
    told: list[Exception] = []

    def work() -> None:
        raise ValueError(len(told))

    task = BackgroundTask(work, "example", on_error=told.append)
    task.start()
    task.close()
    task.run()
    assert [str(error) for error in told] == ["0", "1"]


def test_what_waits_to_begin_does_not_begin_after_close() -> None:
    """A delay ends at once; the work is not done."""
    done: list[int] = []
    task = BackgroundTask(lambda: done.append(1), "example", on_error=lambda _: None)
    begin = time.monotonic()
    task.start(after=60)
    task.close()
    assert (done, task.busy) == ([], False)
    assert time.monotonic() - begin < 10
    task.start(after=0.01)
    deadline = time.monotonic() + 10
    while not done and time.monotonic() < deadline:
        time.sleep(0.005)
    assert done == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_nothing() -> None:
    """What the parent would do twice is left to it."""
    task = BackgroundTask(lambda: None, "example", on_error=lambda _: None)
    child = os.fork()
    if not child:
        task.start(after=60)
        os._exit(int(task.busy))
    assert os.waitpid(child, 0)[1] == 0
