"""Hand a request to the next provider when one fails, and say so; never silently."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memopt import metrics
from memopt.errors import BundleError, DeviceError, InputError, WeightsError
from memopt.runtimes.base import Backend, Placement
from memopt.runtimes.limits import lacks_memory
from memopt.runtimes.processes import keep_for_ever, watch
from memopt.runtimes.providers import FORKS, Unavailable, one_line

if TYPE_CHECKING:
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed, Rows


@dataclass(frozen=True, slots=True)
class FallbackEvent:
    """One hand-over: ``from_`` could not do it, ``to`` took over.

    ``from_`` and ``to`` are providers; they are equal where only the variant had to change, or, for
    want of memory, only the batch.
    ``kind`` is ``unavailable``, ``open``, ``memory`` or ``run``; ``reason`` is what the provider
    said.
    """

    from_: str
    to: str
    reason: str
    kind: str
    from_variant: str
    to_variant: str

    def __str__(self) -> str:
        steps = f"{self.from_}:{self.from_variant} -> {self.to}:{self.to_variant}"
        return f"{steps} ({self.kind}): {self.reason}"


@dataclass(frozen=True, slots=True)
class Failure:
    """What could not be used, in which way (a FallbackEvent's ``kind``) and why."""

    candidate: Placement
    kind: str
    reason: str


class Exhausted(DeviceError):
    """Nothing is left to take over; ``failures`` say of each candidate why."""

    def __init__(
        self, problem: str, failures: Sequence[Failure], *, fix: str | None = None
    ) -> None:
        super().__init__(problem, fix=fix)
        self.failures = tuple(failures)


def lacked_memory(error: DeviceError) -> bool:
    """Return whether a provider failed for want of memory, where nothing took over.

    >>> lacked_memory(DeviceError("no such device"))
    False
    """
    if isinstance(error, Exhausted):
        return any(failure.kind == "memory" for failure in error.failures)
    cause = error.__cause__  # of a strict engine, what the provider raised
    return isinstance(cause, Exception) and lacks_memory(cause)


def tell(events: list[FallbackEvent], failures: Sequence[Failure], winner: Placement) -> None:
    """Append what was handed over to ``events``, to the log and to the metrics."""
    steps = [f.candidate for f in failures] + [winner]
    for failure, following in zip(failures, steps[1:], strict=True):
        from_, to = failure.candidate, following
        event = FallbackEvent(
            from_=from_.provider,
            to=to.provider,
            reason=failure.reason,
            kind=failure.kind,
            from_variant=from_.variant.name,
            to_variant=to.variant.name,
        )
        events.append(event)
        metrics.fallback(from_.provider, to.provider, failure.kind, told=str(event))


class BackendChain:
    """The backend in use and those that may take over.

    In a child of fork() the backend is opened anew when it is first used there.

    Args:
        candidates: what to try, best first.
        open_backend: opens one candidate.
        strict: raise DeviceError instead of falling back.
        events: a list that each FallbackEvent is appended to.

    Raises:
        DeviceError: nothing opened, or the first did not and ``strict`` is set.
    """

    def __init__(
        self,
        candidates: Sequence[Placement],
        open_backend: Callable[[Placement], Backend],
        *,
        strict: bool,
        events: list[FallbackEvent],
    ) -> None:
        self._left = list(candidates)
        self._open = open_backend
        self.strict = strict
        self.events = events
        self._lock = threading.RLock()
        self._closed = False
        self._forked = False  # the backend is of the process that this one was forked from
        self._backend, self._candidate = self._next([])
        watch(self)

    @property
    def backend(self) -> Backend:
        """The backend in use now."""
        if self._forked:
            self._open_own()
        return self._backend

    @property
    def candidate(self) -> Placement:
        """What is in use now."""
        if self._forked:
            self._open_own()
        return self._candidate

    def after_fork(self) -> None:
        """Touch the parent's backend no more."""
        if not self._forked:
            keep_for_ever(self._backend)
        self._forked = True
        self._lock = threading.RLock()  # another thread of the parent may have had the old one

    def _open_own(self) -> None:
        with self._lock:
            if not self._forked or self._closed:
                return
            failures: list[Failure] = []
            if self._candidate.provider in FORKS:
                self._left.insert(0, self._candidate)
            else:
                reason = "its driver does not work in a child of fork()"
                if self.strict:
                    raise DeviceError(
                        f"{self._candidate} cannot be used here: {reason}",
                        fix="start workers with spawn, or open the engine in the worker",
                    )
                failures.append(Failure(self._candidate, "open", reason))
                self._left = [c for c in self._left if c.provider in FORKS]
            self._backend, self._candidate = self._next(failures)
            self._forked = False

    def run(self, feed: Feed) -> Rows:
        """Run one batch here and now, on whichever backend can."""
        self._refuse_closed()
        backend = self.backend
        try:
            return backend.run(feed)
        except Exception as error:  # noqa: BLE001 - any failure of a provider is handed on
            return self._recover(backend, error, feed)

    def run_all(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run the graph as it is and return every output by name, on whichever backend can."""
        self._refuse_closed()
        backend = self.backend
        try:
            return backend.run_all(feed)
        except Exception as error:  # noqa: BLE001 - any failure of a provider is handed on
            outputs: dict[str, NDArray[Any]] = self._retry(backend, error, feed, "run_all")
            return outputs

    def hand_over(self, backend: Backend, error: Exception) -> None:
        """Put the next backend in the place of one that failed; a request's own fault is raised.

        Raises:
            DeviceError: the engine is closed, or nothing is left to take over.
            InputError: the request is wrong, not the provider.
        """
        self._refuse_closed()
        _refuse_input(error)
        with self._lock:
            if backend is self._backend:
                self._replace(error)

    def submit(self, feed: Feed) -> tuple[Backend, Future[Rows]]:
        """Start one batch on the backend in use; pass both to :meth:`result`."""
        self._refuse_closed()
        backend = self.backend
        try:
            return backend, backend.submit(feed)
        except Exception as error:  # noqa: BLE001 - handed on in result()
            from concurrent.futures import Future

            failed: Future[Rows] = Future()
            failed.set_exception(error)
            return backend, failed

    def result(self, backend: Backend, future: Future[Rows], feed: Feed) -> Rows:
        """Wait for a submitted batch; when it failed, run it again on the next backend."""
        try:
            return future.result()
        except Exception as error:  # noqa: BLE001 - any failure of a provider is handed on
            return self._recover(backend, error, feed)

    def close(self) -> None:
        """Close the backend; later requests raise DeviceError."""
        with self._lock:
            self._closed = True
            if not self._forked:
                self._backend.close()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise DeviceError("the engine is closed", fix="open a new ArrowEngine")

    def _recover(self, backend: Backend, error: Exception, feed: Feed) -> Rows:
        rows: Rows = self._retry(backend, error, feed, "run")
        return rows

    def _retry(self, backend: Backend, error: Exception, feed: Feed, verb: str) -> Any:
        while True:
            self._refuse_closed()
            _refuse_input(error)
            # Not of a graph as it is: its rows may be no batch.
            halves = verb == "run" and backend is self._backend
            if halves and _kind(error, "run") == "memory":
                rows = self._halved(backend, feed)
                if rows is not None:
                    self._tell_halved(backend, error)
                    return rows
            with self._lock:
                # Another thread may have moved on already: then only run again.
                if backend is self._backend:
                    self._replace(error)
                backend = self._backend
            try:
                return getattr(backend, verb)(feed)
            except Exception as again:  # noqa: BLE001 - handed on until nothing is left
                error = again

    def _halved(self, backend: Backend, feed: Feed) -> Rows | None:
        """Run a batch that found no memory as two, and those as two; None if one row is too much.

        Whatever else goes wrong is left to the next provider.
        """
        import numpy as np

        count = len(next(iter(feed.values())))
        if count < 2:
            return None
        backend.free()
        found = []
        for rows in (slice(0, count // 2), slice(count // 2, count)):
            part = {name: values[rows] for name, values in feed.items()}
            try:
                found.append(backend.run(part))
            except Exception as error:  # noqa: BLE001 - any failure of a provider is handed on
                again = self._halved(backend, part) if _kind(error, "run") == "memory" else None
                if again is None:
                    return None
                found.append(again)
        return np.concatenate(found)

    def halve(self, backend: Backend) -> None:
        """Make the batches to come half as large at once."""
        backend.tokens = max(1, backend.tokens // 2)

    def _tell_halved(self, backend: Backend, error: Exception) -> None:
        with self._lock:
            self.halve(backend)
            failure = Failure(self._candidate, "memory", f"{one_line(error)}; batch halved")
            tell(self.events, [failure], self._candidate)

    def _replace(self, error: Exception) -> None:
        candidate, failed = self._candidate, self._backend
        kind = _kind(error, "run")
        failure = Failure(candidate, kind, one_line(error))
        if self.strict:
            raise DeviceError(f"{candidate} failed: {failure.reason}") from error
        # The provider itself died or ran out of memory: its other variants are no way out, unless
        # it is the last provider there is.
        others = [c for c in self._left if c.provider != candidate.provider]
        if others:
            self._left = others
        elif not self._left:
            raise Exhausted(
                f"{candidate} failed and nothing is left to take over: {failure.reason}", [failure]
            ) from error
        self._backend, self._candidate = self._next([failure])
        failed.close()

    def _next(self, failures: list[Failure]) -> tuple[Backend, Placement]:
        while self._left:
            candidate = self._left.pop(0)
            try:
                backend = self._open(candidate)
            except Unavailable as error:
                failures.append(Failure(candidate, "unavailable", error.problem))
                self._left = [c for c in self._left if c.provider != candidate.provider]
            except (BundleError, WeightsError):
                # A changed file, or a wrong key, is no failure of a provider: no other takes over.
                raise
            except Exception as error:  # noqa: BLE001 - any failure to open is handed on
                failures.append(Failure(candidate, _kind(error, "open"), one_line(error)))
            else:
                tell(self.events, failures, candidate)
                return backend, candidate
            if self.strict:
                failure = failures[0]
                raise DeviceError(
                    f"{failure.candidate} cannot be used: {failure.reason}",
                    fix="leave strict out to let another provider take over",
                )
        told = "; ".join(f"{f.candidate}: {f.reason}" for f in failures)
        raise Exhausted(
            f"no provider can run this bundle: {told}", failures, fix="run: memopt doctor"
        )


def _refuse_input(error: Exception) -> None:
    if type(error).__name__ == "InvalidArgument":
        # ONNX Runtime says the request is wrong (a shape, a token id beyond the vocabulary): it
        # would be wrong everywhere, and the provider is fine.
        raise InputError(f"the graph refused the input: {one_line(error)}") from error


def _kind(error: Exception, otherwise: str) -> str:
    return "memory" if lacks_memory(error) else otherwise
