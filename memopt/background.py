"""Work beside the caller: one thread at a time, errors told instead of lost, joined on close."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


class BackgroundTask:
    """One piece of work that is done in a thread whenever it is called for.

    In a process that was forked meanwhile nothing is started: the work is the other one's.

    Args:
        work: what is done.
        name: of the thread.
        on_error: told what ``work`` raised; nobody waits who could catch it.
        daemon: False lets the interpreter wait for it at its end.

    >>> done, failed = [], []
    >>> task = BackgroundTask(lambda: done.append(1), "example", on_error=failed.append)
    >>> task.start()
    >>> task.close()
    >>> done, failed, task.busy
    ([1], [], False)
    """

    def __init__(
        self,
        work: Callable[[], object],
        name: str,
        *,
        on_error: Callable[[Exception], object],
        daemon: bool = True,
    ) -> None:
        self._work, self._name, self._on_error, self._daemon = work, name, on_error, daemon
        self._process = os.getpid()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether it is at work, or waits to begin."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, after: float = 0.0) -> None:
        """Begin in a thread, unless it is busy; ``after`` so many seconds."""
        with self._guard:
            if self.busy or os.getpid() != self._process:
                return
            self._stop.clear()
            self._thread = threading.Thread(
                target=self._begin, args=(after,), name=self._name, daemon=self._daemon
            )
            self._thread.start()

    def run(self) -> None:
        """Do it here and now; an error is told as one in the thread is."""
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - whatever it is, on_error says what it means
            self._on_error(error)

    def close(self) -> None:
        """Wait until it is through; what waits to begin does not begin any more."""
        self._stop.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _begin(self, after: float) -> None:
        if not (after and self._stop.wait(after)):
            self.run()
