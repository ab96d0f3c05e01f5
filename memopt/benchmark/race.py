"""The contenders of one run: a process each, side by side, those that fail left out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from memopt.benchmark.peers import Contender
from memopt.benchmark.record import PACKAGES
from memopt.errors import MemoptError
from memopt.progress import Step
from memopt.runtimes.cpu import usable_cpus

WORKER = Path(__file__).with_name("worker.py")


class Worker:
    """A contender in a process of its own, and what was measured of it."""

    def __init__(self, contender: Contender, environment: Mapping[str, str]) -> None:
        self.contender = contender
        self.opened: dict[str, Any] = {}
        self.answers: Any = np.empty((0, 0), np.float32)  # vectors, or a row an input
        self.seconds: list[float] = []
        self.latencies: list[float] = []
        self.round_latencies: list[float] = []  # the median of each round
        self.memory: dict[str, float] = {}
        self.kernels: dict[str, Any] = {}
        self.variants: dict[str, str] = {}  # that answered, of memopt's own
        self.vram_mb: float | None = None
        # The worker needs only its own folder off the path: a file there must not shadow a package.
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self.process = subprocess.Popen(
            [contender.python, "-P", str(WORKER), json.dumps(contender.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise MemoptError(f"{self.contender.label}: the benchmark process {self._end()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MemoptError(f"{self.contender.label}: {answer['error']}")
        return answer

    def _end(self) -> str:
        """Say how the process ended, with the last line it wrote."""
        code = self.process.wait()
        self.log.seek(0)
        tail = self.log.read().decode(errors="replace").strip().splitlines()[-1:]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"{how}: {tail[0]}" if tail else how

    def leave(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the process: after its last answer, or at once when something went wrong."""
        if kind is not None:
            self.process.kill()
        try:
            if self.process.stdin is not None:
                self.process.stdin.close()
        except BrokenPipeError:
            self.process.kill()  # it died with a command unread
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()


class Race:
    """The contenders that still run: one that fails is left out, unless nothing goes without it.

    Attributes:
        workers: one process each, in the order they were started.
    """

    def __init__(
        self,
        inputs: Path,
        stack: ExitStack,
        on_step: Step,
        must: Sequence[Contender],
        failures: dict[str, str] | None,
    ) -> None:
        self.workers: list[Worker] = []
        self._inputs, self._stack, self._must, self._failures = inputs, stack, must, failures
        self._say = on_step
        self._threads = {"OMP_NUM_THREADS": str(usable_cpus()), "HF_HUB_OFFLINE": "1"}

    def start(self, contender: Contender) -> None:
        """Start its process and open its model."""

        def begin() -> None:
            worker = Worker(contender, self._threads)
            self._stack.push(worker.leave)
            worker.opened = worker.ask(do="open", inputs=str(self._inputs), packages=PACKAGES)
            self.workers.append(worker)

        self._step("open", contender, begin)

    def each(self, what: str, work: Callable[[Worker], object], way: int = 1) -> None:
        """Let each of them do it, in their order or (-1) from the last to the first."""
        for worker in self.workers[::way]:  # a copy: one that fails is taken off the list
            self._step(what, worker.contender, partial(work, worker))

    def leave(self) -> Any:
        """End the only one; return its answers."""
        worker = self.workers.pop()
        worker.leave(None)
        return worker.answers

    def _step(self, what: str, contender: Contender, work: Callable[[], object]) -> None:
        self._say(f"{what} {contender.label}")
        try:
            work()
        except MemoptError as error:
            if self._failures is None or contender in self._must:
                raise
            reason = str(error).removeprefix(f"{contender.label}: ")
            self._failures[contender.label] = reason
            self.workers = [w for w in self.workers if w.contender is not contender]
