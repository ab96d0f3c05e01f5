"""Attempts until one succeeds: growing pauses with jitter, one deadline over all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from memopt.federation.failures import SyncFailure
from memopt.metrics import count, fallback

# Waiting grows from a fifth of a second to ten; full jitter keeps a fleet from coming in step
# (Brooker 2015, "Exponential Backoff And Jitter").
_FIRST_SECONDS, _CEILING_SECONDS = 0.2, 10.0
# Another base, or a delta that gave other bits than it should: everything, bit for bit, will do.
_FALL_BACK = ("need-full", "wrong-result")


class Progressing(Protocol):
    """What is attempted: how far it came, and whether there is another way to do it."""

    moved: int

    def fall_back(self) -> bool:
        """Take the other way from now on; False when there is none."""


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often and how long something is attempted.

    ``most`` further attempts follow a failure that may pass; an attempt that moved on does not
    count. ``deadline`` is in seconds and over all attempts together; None is no bound.

    >>> Retries(most=3).run(lambda ends: None)
    1
    """

    most: int = 3
    deadline: float | None = None
    chance: random.Random = field(default_factory=random.Random)

    def run(self, attempt: Callable[[float], None], job: Progressing | None = None) -> int:
        """Call ``attempt`` with the time (``time.monotonic()``) at which it must be over, until it
        returns; return the number of attempts. Without a ``job`` nothing can come half-way.

        Raises:
            SyncFailure: refused for good, still failing after the retries, or out of time.
        """
        attempts = failures = 0
        ends = time.monotonic() + (self.deadline or float("inf"))
        while True:
            attempts += 1
            before = job.moved if job else 0
            try:
                attempt(ends)
                return attempts
            except SyncFailure as error:
                if job and error.code in _FALL_BACK and job.fall_back():
                    fallback("delta", "full", error.code, told=f"delta -> full: {error.problem}")
                    continue
                if not error.retryable:
                    raise
                failures = 1 if job and job.moved > before else failures + 1
                if failures > self.most:
                    raise
                pause = self.chance.uniform(
                    0, min(_CEILING_SECONDS, _FIRST_SECONDS * 2 ** (failures - 1))
                )
                if time.monotonic() + pause > ends:
                    raise SyncFailure(
                        "timeout",
                        f"not done within {self.deadline:g} s; at last: {error.problem}",
                        fix="allow more time: what has arrived is resumed",
                    ) from error
                count("memopt_sync_retries_total", code=error.code)
            time.sleep(pause)
