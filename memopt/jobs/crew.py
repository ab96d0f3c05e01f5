"""Who works on which fragment: handed out in order, taken back from a worker that died."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from memopt.errors import DeviceError
from memopt.jobs.source import Fragment

# What a worker may hold: one is computed while the other is read, tokenised or written.
SLOTS = 2
# How often a fragment may take its worker along before the job gives up.
_ATTEMPTS = 6


@dataclass(frozen=True, slots=True)
class WorkerMessage:
    """What a worker said: it is ``ready``, has ``done`` a fragment, found too little ``memory``,
    ``failed``, or ``died``."""

    worker: int
    kind: Literal["ready", "done", "memory", "failed", "died"]
    number: int = -1
    value: Any = None


class Workers(Protocol):
    """Where workers run: processes here, or actors of a cluster."""

    count: int

    def start(self, worker: int, halvings: int) -> None:
        """Start one, also in place of one that is gone; it says ``ready``."""

    def send(self, worker: int, fragment: Fragment) -> None:
        """Have it work on a fragment; it says how that went."""

    def receive(self) -> WorkerMessage:
        """Wait for what any of them says."""

    def close(self) -> None:
        """End all of them."""


class Crew:
    """Hands fragments to workers and yields what they have done.

    A worker that died, or found too little memory, is started anew and gets its fragments again;
    with batches of half the size where memory was the reason, or where it dies of the same
    fragment twice.

    Args:
        workers: where they run.
        check: told what each worker says of itself before it gets its first fragment.
    """

    def __init__(self, workers: Workers, check: Any) -> None:
        self._workers, self._check = workers, check
        self._ready: set[int] = set()
        self._holds: dict[int, dict[int, Fragment]] = {i: {} for i in range(workers.count)}
        self._halvings = 0
        self._attempts: dict[int, int] = {}
        self.restarts: list[str] = []

    def run(self, fragments: Iterable[Fragment]) -> Iterator[tuple[Fragment, dict[str, Any]]]:
        """Yield each fragment with its note, in the order they are done.

        Raises:
            MemoptError: what a worker failed with.
            DeviceError: a fragment takes every worker along.
        """
        left = deque(fragments)
        for worker in range(min(self._workers.count, len(left))):
            self._workers.start(worker, 0)
        while left or any(self._holds.values()):
            self._hand_out(left)
            message = self._workers.receive()
            if message.kind == "ready":
                self._check(message.value)
                self._ready.add(message.worker)
            elif message.kind == "done":
                yield self._holds[message.worker].pop(message.number), message.value
            elif message.kind == "failed":
                raise message.value
            else:
                self._restart(message, left)

    def _hand_out(self, left: deque[Fragment]) -> None:
        # In turn, so that the last ones are not all with one of them.
        for _ in range(SLOTS):
            for worker in sorted(self._ready):
                holds = self._holds[worker]
                if left and len(holds) < SLOTS:
                    fragment = left.popleft()
                    holds[fragment.number] = fragment
                    self._workers.send(worker, fragment)

    def _restart(self, message: WorkerMessage, left: deque[Fragment]) -> None:
        holds = self._holds[message.worker]
        if message.worker not in self._ready and not holds:
            raise DeviceError(
                f"a worker ended before it was ready: {message.value}",
                fix="free memory, or give fewer --workers",
            )
        for number in holds:
            self._attempts[number] = self._attempts.get(number, 0) + 1
        again = max(self._attempts[number] for number in holds) if holds else 1
        if again > _ATTEMPTS:
            raise DeviceError(
                f"fragment {min(holds)} ended its worker {again} times: {message.value}",
                fix="give smaller --fragment-rows or --batch-size, or fewer --workers",
            )
        halve = message.kind == "memory" or again > 1
        self._halvings += halve
        self.restarts.append(f"{message.value}{'; batches halved' if halve else ''}")
        left.extendleft(sorted(holds.values(), key=lambda fragment: -fragment.number))
        holds.clear()
        self._ready.discard(message.worker)
        self._workers.start(message.worker, self._halvings)
