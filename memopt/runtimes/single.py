"""Requests of one input, answered by the variant that is fastest for those."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from memopt.bundle import Bundle
from memopt.errors import DeviceError
from memopt.runtimes.base import Backend, Placement, Settings
from memopt.runtimes.batching import run_items
from memopt.runtimes.fallback import BackendChain, Exhausted, Failure, tell
from memopt.runtimes.processes import watch
from memopt.runtimes.selection import tuned_settings, tuned_single

if TYPE_CHECKING:
    from memopt.runtimes.batching import FrontEnd


def single_path(
    bundle: Bundle,
    main: BackendChain,
    settings: Settings,
    open_backend: Callable[..., Backend],
) -> SinglePath | None:
    """Return what answers single inputs; None where it would be what answers batches again.

    Args:
        main: the chain that answers batches.
        settings: what the engine was given.
        open_backend: opens a placement; told ``single=True``.
    """
    placement = tuned_single(bundle)
    if placement is None:
        return None
    alone, batches = (
        tuned_settings(bundle, placement, settings, single=single) for single in (True, False)
    )
    if str(placement) == str(main.candidate) and alone == batches:
        return None
    return SinglePath(placement, main, partial(open_backend, single=True))


class SinglePath:
    """A second backend beside an engine's own, opened when the first single input comes.

    Where it cannot be opened, does not fit the memory limit or fails later, that is one
    FallbackEvent, and from then on the engine's own backend answers.

    Args:
        placement: what was measured as fastest for one input.
        main: the chain that answers batches.
        open_backend: opens a placement.

    With ``main.strict`` a DeviceError is raised instead.
    """

    def __init__(
        self,
        placement: Placement,
        main: BackendChain,
        open_backend: Callable[[Placement], Backend],
    ) -> None:
        self.placement = placement
        self._main = main
        self._open_backend = open_backend
        self._chain: BackendChain | None = None
        self._given_up = False
        self.after_fork()
        watch(self)

    def after_fork(self) -> None:
        """In a child of fork(): another thread may have had the lock, and front ends start anew."""
        self._lock = threading.Lock()
        self._front: FrontEnd | None = None

    @property
    def chain(self) -> BackendChain | None:
        """The backend for single inputs, opened now if need be; None where there is none.

        Raises:
            DeviceError: it cannot be opened, only with ``strict``.
        """
        if self._chain is None and not self._given_up:
            with self._lock:
                if self._chain is None and not self._given_up:
                    self._open()
        return self._chain

    def run(
        self,
        shared: FrontEnd,
        make: Callable[[Sequence[str]], FrontEnd],
        front: Callable[[FrontEnd, Sequence[str]], FrontEnd] | None,
        rest: tuple[Any, ...],
    ) -> BackendChain | None:
        """Answer a request of one input; None where the engine's own backend has to.

        Args:
            shared: the engine's own front end, used where both graphs take the same inputs.
            make: makes one for the inputs of another graph.
            front: of :meth:`memopt.runtimes.task_engine.Engine._run`.
            rest: what else :func:`memopt.runtimes.batching.run_items` takes.

        Raises:
            DeviceError: the backend cannot be opened or fails, only with ``strict``.
        """
        chain = self.chain
        if chain is None:
            return None
        try:
            inputs = chain.backend.inputs
            made = self._front_end(shared, make, inputs)
            run_items(chain, front(made, inputs) if front else made, *rest)
        except DeviceError as error:
            if isinstance(error, Exhausted):
                self._give_up(error.failures)
                chain.close()
            elif not self._given_up:
                raise
            # Else another thread gave it up and closed it while this one was in it.
            return None
        return chain

    def _front_end(
        self, shared: FrontEnd, make: Callable[[Sequence[str]], FrontEnd], inputs: Sequence[str]
    ) -> FrontEnd:
        if set(inputs) == set(self._main.backend.inputs):
            return shared
        with self._lock:
            if self._front is None:
                self._front = make(inputs)
            return self._front

    def _give_up(self, failures: Sequence[Failure]) -> None:
        """Leave single inputs to the engine's own backend from now on, and say why, once."""
        self._chain = None
        if not self._given_up:
            self._given_up = True
            tell(self._main.events, failures, self._main.candidate)

    def info(self) -> dict[str, Any] | None:
        """Return what answers single inputs; None where the engine's own backend does."""
        if self._given_up:
            return None
        chain = self._chain
        told = {
            "device": self.placement.provider,
            "variant": self.placement.variant.name,
            "precision": self.placement.variant.precision,
            "open": chain is not None,
        }
        return told if chain is None else {**told, **chain.backend.info()}

    def close(self) -> None:
        """Free the backend; nothing opens again."""
        with self._lock:
            self._given_up = True
            if self._chain is not None:
                self._chain.close()

    def _open(self) -> None:
        """Open it, or give up. The caller holds the lock."""
        main = self._main
        try:
            chain = BackendChain(
                [self.placement], self._open_backend, strict=main.strict, events=main.events
            )
        except Exhausted as error:
            self._give_up(error.failures)
            return
        ours, theirs = chain.backend.dimension, main.backend.dimension
        if ours and theirs and ours != theirs:
            chain.close()
            why = f"it gives vectors of {ours} numbers, the variant for batches {theirs}"
            self._give_up([Failure(self.placement, "open", why)])
            return
        self._chain = chain
