"""Workers that are actors of a Ray cluster, or of a local one made for the job."""

from __future__ import annotations

import os
import socket
from typing import Any
from urllib.parse import urlsplit

from memopt.errors import DeviceError, brief
from memopt.extras import require
from memopt.jobs.crew import SLOTS, WorkerMessage
from memopt.jobs.local import plain
from memopt.jobs.source import Fragment
from memopt.jobs.worker import EmbedTask, FragmentWorker
from memopt.runtimes.cpu import usable_cpus

# Seconds until an address that does not answer is none.
_PATIENCE = 10


class Actors:
    """Ray actors, each with an engine; the same work and the same parts as local processes.

    The job's folder, the bundle and a local source must be at the same path on every node.

    Args:
        task: what they do.
        count: how many.
        address: of a cluster (``auto``, ``ray://host:10001``); None makes one of this machine.

    Raises:
        MissingExtra: Ray is not installed.
        DeviceError: no cluster at the address.
    """

    def __init__(self, task: EmbedTask, count: int, address: str | None = None) -> None:
        self._ray = ray = require("ray", extra="ray", why="run a job on a cluster")
        if address:
            _check_reached(address)
        self._task, self.count = task, count
        cores = task.threads or max(1, usable_cpus() // count)
        own: dict[str, Any] = {"num_cpus": max(cores * count, usable_cpus())}
        # A cluster's workers have an environment of their own.
        paths = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": paths} if address else None,
                **({} if address else {**own, "include_dashboard": False}),
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise DeviceError(
                f"no Ray cluster at {address!r}: {brief(error)}",
                fix="start one: ray start --head; one that wants a token: RAY_AUTH_MODE=token",
            ) from error
        self._class = ray.remote(num_cpus=cores, max_concurrency=SLOTS)(Actor)
        self._actors: dict[int, Any] = {}
        self._waiting: dict[Any, tuple[int, int]] = {}

    def start(self, worker: int, halvings: int) -> None:
        """See :class:`memopt.jobs.crew.Workers`."""
        self._end(worker)
        self._actors[worker] = actor = self._class.remote(self._task, halvings)
        self._waiting[actor.info.remote()] = (worker, -1)

    def send(self, worker: int, fragment: Fragment) -> None:
        """See :class:`memopt.jobs.crew.Workers`."""
        reference = self._actors[worker].run.remote(fragment)
        self._waiting[reference] = (worker, fragment.number)

    def receive(self) -> WorkerMessage:
        """See :class:`memopt.jobs.crew.Workers`."""
        (reference, *_), _ = self._ray.wait(list(self._waiting), num_returns=1)
        worker, number = self._waiting.pop(reference)
        try:
            kind, value = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._forget(worker)
            return WorkerMessage(worker, "died", number, f"worker {worker} ended: {brief(error)}")
        except self._ray.exceptions.RayError as error:
            return WorkerMessage(worker, "failed", number, plain(error))
        return WorkerMessage(worker, kind, number, value)

    def close(self) -> None:
        """See :class:`memopt.jobs.crew.Workers`."""
        for worker in list(self._actors):
            self._end(worker)
        self._ray.shutdown()

    def _forget(self, worker: int) -> None:
        self._waiting = {ref: held for ref, held in self._waiting.items() if held[0] != worker}

    def _end(self, worker: int) -> None:
        if worker in self._actors:
            self._forget(worker)
            self._ray.kill(self._actors.pop(worker))


def _check_reached(address: str) -> None:
    """Refuse an address that nobody listens at: Ray would ask there for many minutes."""
    place = urlsplit(address if "://" in address else f"ray://{address}")
    if place.port is None:
        return  # "auto", or a name that Ray resolves
    try:
        socket.create_connection((place.hostname, place.port), _PATIENCE).close()
    except OSError as error:
        raise DeviceError(
            f"no Ray cluster at {address!r}: {brief(error)}", fix="start one: ray start --head"
        ) from error


class Actor:
    """A :class:`FragmentWorker` whose failures are values, so that each says what it was."""

    def __init__(self, task: EmbedTask, halvings: int) -> None:
        self._arguments = task, halvings
        self._worker: FragmentWorker | None = None

    def info(self) -> tuple[str, Any]:
        """Open the engine and say what it is."""
        try:
            self._worker = FragmentWorker(*self._arguments)
            return "ready", self._worker.info()
        except Exception as error:  # noqa: BLE001 - told to the driver, which raises it
            return "failed", plain(error)

    def run(self, fragment: Fragment) -> tuple[str, Any]:
        """Make the part of one fragment."""
        assert self._worker is not None, "info() comes first"
        try:
            return "done", self._worker.run(fragment)
        except MemoryError as error:
            return "memory", f"too little memory: {brief(error)}"
        except Exception as error:  # noqa: BLE001 - told to the driver, which raises it
            return "failed", plain(error)
