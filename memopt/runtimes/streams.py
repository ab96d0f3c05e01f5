"""A few threads that run batches beside the caller, made when first needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from memopt.runtimes.base import Feed, Rows


class Streams:
    """``count`` threads, each in one run at a time.

    A session releases the interpreter lock while it runs, so threads are enough. OpenVINO's
    AsyncInferQueue is not used on purpose: when an inference fails it never calls back (2026.4),
    and whoever waits for that batch would wait for ever instead of falling back.
    """

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self._name = name
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def submit(self, run: Callable[[Feed], Rows], feed: Feed) -> Future[Rows]:
        """Run ``run(feed)`` in the next free thread.

        Raises:
            RuntimeError: closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name} is closed")
            if self._pool is None:
                from concurrent.futures import ThreadPoolExecutor

                self._pool = ThreadPoolExecutor(self.count, self._name)
            return self._pool.submit(run, feed)

    def close(self) -> None:
        """Take no more work; what is running ends."""
        with self._lock:
            self._closed = True
            if self._pool is not None:
                self._pool.shutdown(wait=False)
