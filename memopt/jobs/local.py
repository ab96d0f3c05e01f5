"""Workers that are processes of this machine."""

from __future__ import annotations

import os
import pickle
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from memopt.errors import DeviceError, MemoptError, brief
from memopt.jobs.crew import SLOTS, WorkerMessage
from memopt.jobs.source import Fragment
from memopt.jobs.worker import EmbedTask, FragmentWorker

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


class Processes:
    """Spawned processes, each with an engine; what they map of a bundle's files they share.

    Args:
        task: what they do.
        count: how many.
    """

    def __init__(self, task: EmbedTask, count: int) -> None:
        import multiprocessing

        # A forked child would hang in the sessions of its parent.
        self._context = multiprocessing.get_context("spawn")
        self._task, self.count = task, count
        self._members: dict[int, tuple[Any, Connection]] = {}
        self._said: deque[WorkerMessage] = deque()

    def start(self, worker: int, halvings: int) -> None:
        """See :class:`memopt.jobs.crew.Workers`."""
        self._end(worker)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._task, halvings), name=f"memopt-job-{worker}"
        )
        process.start()
        theirs.close()
        self._members[worker] = (process, ours)

    def send(self, worker: int, fragment: Fragment) -> None:
        """See :class:`memopt.jobs.crew.Workers`."""
        with suppress(OSError):  # it died: receive() says so
            self._members[worker][1].send(fragment)

    def receive(self) -> WorkerMessage:
        """See :class:`memopt.jobs.crew.Workers`."""
        from multiprocessing.connection import wait

        while not self._said:
            for connection in wait([own for _, own in self._members.values()]):
                worker = next(i for i, (_, own) in self._members.items() if own is connection)
                try:
                    kind, number, value = self._members[worker][1].recv()
                except (EOFError, OSError, pickle.UnpicklingError):
                    self._said.append(WorkerMessage(worker, "died", value=self._obituary(worker)))
                else:
                    self._said.append(WorkerMessage(worker, kind, number, value))
        return self._said.popleft()

    def close(self) -> None:
        """See :class:`memopt.jobs.crew.Workers`."""
        for worker in list(self._members):
            self._end(worker)

    def _obituary(self, worker: int) -> str:
        process, connection = self._members.pop(worker)
        connection.close()
        process.join()
        code = process.exitcode
        return f"worker {worker} ended with " + (f"signal {-code}" if code < 0 else f"code {code}")

    def _end(self, worker: int) -> None:
        if worker in self._members:
            process, connection = self._members.pop(worker)
            self._said = deque(m for m in self._said if m.worker != worker)
            process.kill()  # what it writes is whole or not there
            process.join()
            connection.close()


def _serve(connection: Connection, task: EmbedTask, halvings: int) -> None:
    """Work for the process at the other end, and end with it."""
    import signal

    # Ctrl-C reaches the whole group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    guard = threading.Lock()

    def say(kind: str, number: int, value: Any) -> None:
        with guard:
            connection.send((kind, number, value))

    try:
        worker = FragmentWorker(task, halvings)
        say("ready", -1, worker.info())
    except Exception as error:  # noqa: BLE001 - told to the parent, which raises it
        say("failed", -1, plain(error))
        return

    def run(fragment: Fragment) -> None:
        try:
            say("done", fragment.number, worker.run(fragment))
        except MemoryError as error:
            say("memory", fragment.number, f"too little memory: {brief(error)}")
        except Exception as error:  # noqa: BLE001 - told to the parent, which raises it
            say("failed", fragment.number, plain(error))

    pool = ThreadPoolExecutor(SLOTS, "memopt-fragment")
    try:
        while True:
            pool.submit(run, connection.recv())
    except EOFError:
        # Nobody is left to work for: what is under way would be a second job's.
        os._exit(1)


def plain(error: Exception) -> MemoptError | OSError:
    """Return an error as one that goes to another process and says what it was."""
    if type(error).__module__ == "memopt.errors" and isinstance(error, MemoptError):
        return error
    if isinstance(error, MemoptError):
        return DeviceError(error.problem, fix=error.fix)
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    return DeviceError(f"a worker failed: {type(error).__name__}: {brief(error)}")
