"""Requests of many clients in batches: a bounded queue, cut by tokens, fair between sizes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from memopt.errors import DeviceError

# Answers the inputs of one batch: for each an answer, or the error that is its own.
Run = Callable[[Sequence[Any]], Sequence[Any]]
# A batch of this many inputs gains nothing from waiting for more.
_ENOUGH = 64
# A request in a batch gets at least this many tokens of it, so that short ones are not cut.
_LEAST_SHARE = 64


class Full(DeviceError):
    """Too much waits already; ``seconds`` from now there is likely to be room."""

    def __init__(self, problem: str, seconds: int) -> None:
        super().__init__(problem, fix=f"ask again in {seconds} s")
        self.seconds = seconds


@dataclass(slots=True, kw_only=True)
class Answered:
    """The answers of a request, in order, and how long it waited and was computed, in seconds."""

    answers: list[Any]
    queued: float
    computed: float


@dataclass(slots=True, kw_only=True, eq=False)
class _Request:
    key: Hashable
    run: Run
    items: Sequence[Any]
    costs: Sequence[int]
    deadline: float
    future: Future[Answered] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)
    started: float = 0.0
    taken: int = 0  # items that are in a batch, or were
    answers: list[Any] = field(default_factory=list)

    @property
    def waiting(self) -> bool:
        return self.taken < len(self.items)


class Batcher:
    """Computes the requests of one model, as many together as fit ``batch_tokens``.

    While a batch is computed the next one gathers. Requests of one key share a batch, in turns of
    equal tokens, so that a large one delays a small one by one batch at most.

    Args:
        batch_tokens: of one batch; an input larger than that is a batch of its own.
        queue_tokens: that may wait in all; more is refused. None is any number.
        delay: seconds that the first request of a batch waits for others, unless they come before.

    >>> batcher = Batcher(batch_tokens=8, queue_tokens=100)
    >>> lengths = lambda texts: [len(text) for text in texts]
    >>> batcher.submit("length", lengths, ["a", "bcd"], [1, 3], seconds=5).result().answers
    [1, 3]
    >>> batcher.close()
    """

    def __init__(
        self, *, batch_tokens: int, queue_tokens: int | None = None, delay: float = 0.0
    ) -> None:
        self._batch_tokens = batch_tokens
        self._queue_tokens = queue_tokens
        self._delay = delay
        self._requests: deque[_Request] = deque()
        self._tokens = 0
        self._rate = 0.0  # tokens a second, of late
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self.last_size = 0
        self.last_tokens = 0
        self.fill = 0.0  # share of batch_tokens that batches used, of late

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._requests)

    def submit(
        self, key: Hashable, run: Run, items: Sequence[Any], costs: Sequence[int], *, seconds: float
    ) -> Future[Answered]:
        """Queue the inputs of one request; cancelling the future takes out what has not begun.

        Args:
            key: of requests whose inputs ``run`` may answer together.
            costs: tokens of each input, about.
            seconds: after which it fails with TimeoutError if it still waits.

        Raises:
            Full: too much waits already.
            DeviceError: closed.
        """
        total = sum(costs)
        now = time.monotonic()
        request = _Request(key=key, run=run, items=items, costs=costs, deadline=now + seconds)
        if not items:
            request.future.set_result(Answered(answers=[], queued=0.0, computed=0.0))
            return request.future
        with self._changed:
            if self._closed:
                raise DeviceError("the engine is closed", fix="open a new one")
            # One alone is taken whatever its size: it is limited elsewhere.
            most = self._queue_tokens
            if most is not None and self._requests and self._tokens + total > most:
                wait = max(1, round(self._tokens / self._rate)) if self._rate else 1
                raise Full(f"{self._tokens} tokens wait already, and {most} may", min(wait, 60))
            self._requests.append(request)
            self._tokens += total
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="memopt-batch", daemon=True)
                self._thread.start()
            self._changed.notify()
        return request.future

    def close(self) -> None:
        """Answer what waits, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._requests and not self._closed:
                    self._changed.wait()
                self._wait_for_others()
                self._drop_dead()
                if not self._requests:
                    if self._closed:
                        return
                    continue
                batch = self._gather()
            self._compute(batch)

    def _wait_for_others(self) -> None:
        """Let a batch gather; requests that came during the last one have waited already."""
        while self._delay and self._requests and not self._closed:
            left = self._requests[0].since + self._delay - time.monotonic()
            if left <= 0 or sum(len(r.items) for r in self._requests) >= _ENOUGH:
                return
            self._changed.wait(left)

    def _drop_dead(self) -> None:
        """Take out what was cancelled, or waited too long."""
        now = time.monotonic()
        alive: deque[_Request] = deque()
        for request in self._requests:
            if now > request.deadline:
                _fail(request.future, TimeoutError())
            if request.future.done():
                self._tokens -= sum(request.costs[request.taken :])
            else:
                alive.append(request)
        self._requests = alive

    def _gather(self) -> list[tuple[_Request, int, int]]:
        """Return parts (request, from, to) of the next batch, of the key that waited longest."""
        key = self._requests[0].key
        able = [request for request in self._requests if request.key == key]
        share = max(self._batch_tokens // len(able), _LEAST_SHARE)
        left, now = self._batch_tokens, time.monotonic()
        parts: list[tuple[_Request, int, int]] = []
        while able and left > 0:
            for request in able:
                if left <= 0:
                    break
                first, taken = request.taken, 0
                while request.waiting and (not taken or taken < min(share, left)):
                    taken += request.costs[request.taken]
                    request.taken += 1
                request.started = request.started or now
                parts.append((request, first, request.taken))
                left -= taken
                self._tokens -= taken
            able = [request for request in able if request.waiting]
        self.last_tokens = self._batch_tokens - left
        # What is left of large requests goes behind those of other keys that wait.
        rest = [request for request in self._requests if request.waiting]
        self._requests = deque(sorted(rest, key=lambda request: request.key == key))
        return parts

    def _compute(self, parts: list[tuple[_Request, int, int]]) -> None:
        items = [item for request, first, to in parts for item in request.items[first:to]]
        begin = time.monotonic()
        try:
            answers = parts[0][0].run(items)
        except Exception as error:  # noqa: BLE001 - every caller gets it
            for request, _, _ in parts:
                _fail(request.future, error)
            return
        end = time.monotonic()
        self._note(len(items), end - begin)
        start = 0
        for request, first, to in parts:
            request.answers += answers[start : start + to - first]
            start += to - first
            if len(request.answers) == len(request.items):
                queued, computed = request.started - request.since, end - request.started
                answered = Answered(answers=request.answers, queued=queued, computed=computed)
                with suppress(InvalidStateError):  # cancelled this moment
                    request.future.set_result(answered)

    def _note(self, count: int, seconds: float) -> None:
        self.last_size = count
        rate = self.last_tokens / max(seconds, 1e-6)
        self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate
        self.fill = 0.9 * self.fill + 0.1 * min(1.0, self.last_tokens / self._batch_tokens)


def _fail(future: Future[Answered], error: Exception) -> None:
    with suppress(InvalidStateError):  # cancelled, or failed before
        future.set_exception(error)
