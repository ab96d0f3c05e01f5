"""Concurrent small requests become one batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memopt.errors import DeviceError
from memopt.runtimes.vectors import Encoded, refusal, unit_length

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A batch of this many inputs gains nothing from waiting for more.
_ENOUGH = 64


@dataclass(frozen=True, slots=True)
class _Request:
    items: Sequence[Any]
    normalize: bool
    future: Future[NDArray[np.float32]]
    since: float  # time.monotonic() when it came


class Coalescer:
    """Collects requests for up to ``max_delay_ms`` and encodes them together.

    Requests may come from any thread or event loop. One that is waiting is never delayed by more
    than the deadline plus the batch that is running.

    Args:
        encode: encodes inputs without normalising and reports unusable ones by position.
        max_delay_ms: how long the first request of a batch waits for others.
    """

    def __init__(self, encode: Callable[[Sequence[Any]], Encoded], max_delay_ms: float) -> None:
        self._encode = encode
        self._delay = max_delay_ms / 1000
        self._waiting: list[_Request] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, items: Sequence[Any], normalize: bool) -> Future[NDArray[np.float32]]:
        """Return the future vectors of ``items``.

        Raises:
            DeviceError: closed.
        """
        request = _Request(items, normalize, Future(), time.monotonic())
        with self._changed:
            if self._closed:
                raise DeviceError("the engine is closed", fix="open a new ArrowEngine")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="memopt-coalesce", daemon=True
                )
                self._thread.start()
            self._waiting.append(request)
            self._changed.notify()
        return request.future

    def close(self) -> None:
        """Answer what is waiting, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                # Those that came while a batch was running have waited already.
                deadline = self._waiting[0].since + self._delay
                while not self._closed and sum(len(r.items) for r in self._waiting) < _ENOUGH:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._changed.wait(left):
                        break
                batch, self._waiting = self._waiting, []
            self._answer([r for r in batch if r.future.set_running_or_notify_cancel()])

    def _answer(self, batch: list[_Request]) -> None:
        try:
            encoded = self._encode([item for request in batch for item in request.items])
        except Exception as error:  # noqa: BLE001 - every caller gets it
            for request in batch:
                request.future.set_exception(error)
            return
        start = 0
        for request in batch:
            end = start + len(request.items)
            failures = {i - start: why for i, why in encoded.failures.items() if start <= i < end}
            if failures:
                request.future.set_exception(refusal(failures))
            else:
                vectors = encoded.vectors[start:end].copy()
                if request.normalize:
                    unit_length(vectors)
                request.future.set_result(vectors)
            start = end
