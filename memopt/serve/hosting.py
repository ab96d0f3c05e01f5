"""The models of a server: opened when first asked for, closed when memory is short, swapped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.bundle import Bundle, open_bundle
from memopt.errors import ConfigurationError
from memopt.runtimes.batcher import Batcher
from memopt.runtimes.fallback import FallbackEvent
from memopt.runtimes.limits import resident_mb
from memopt.runtimes.task_engine import open_task
from memopt.serve.failures import Refusal
from memopt.tasks.table import Task


@dataclass(slots=True, kw_only=True)
class Capacity:
    """What a server may take.

    ``batch_tokens`` and ``queue_tokens`` as of :class:`memopt.runtimes.batcher.Batcher`;
    ``memory_limit_mb`` is resident memory of the process, past which models that nobody uses are
    closed and no other is opened.
    """

    batch_tokens: int = 8192
    queue_tokens: int = 1_000_000
    memory_limit_mb: float | None = None
    seconds: float = 60.0  # a request may take
    body_bytes: int = 32 << 20
    inputs: int = 2048  # of one request


class Opened:
    """An engine with its batcher, and how many requests are in it."""

    def __init__(self, bundle: Bundle, engine: Any, limits: Capacity) -> None:
        self.bundle = bundle
        self.engine = engine
        self.batcher = Batcher(batch_tokens=limits.batch_tokens, queue_tokens=limits.queue_tokens)
        self.users = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def close(self) -> None:
        """Answer what waits, then free the engine."""
        self.batcher.close()
        self.engine.close()


class Hosted:
    """One model by its name; its engine while that is open."""

    def __init__(self, name: str, path: Path, options: Mapping[str, Any], limits: Capacity) -> None:
        self.name = name
        self.path = path
        self.bundle = open_bundle(path)
        self.opened: Opened | None = None
        self.used = 0.0
        self.created = int(time.time())
        self._options = options
        self._limits = limits
        self._turn = asyncio.Lock()

    @property
    def task(self) -> Task:
        """What it answers."""
        return self.bundle.task

    @property
    def events(self) -> tuple[FallbackEvent, ...]:
        """Its fallbacks since it was opened."""
        return self.opened.engine.events if self.opened else ()

    async def open(self) -> Opened:
        """Return the engine, opened and warm."""
        async with self._turn:
            if self.opened is None:
                self.opened = await asyncio.to_thread(self._open)
            return self.opened

    def _open(self) -> Opened:
        bundle = open_bundle(self.path)
        engine = open_task(bundle, shares_cores=True, **self._options)
        try:
            _warm(bundle, engine)
        except BaseException:
            engine.close()
            raise
        self.bundle = bundle
        return Opened(bundle, engine, self._limits)

    async def close(self) -> None:
        """Close the engine behind its last request; the next one opens it anew."""
        async with self._turn:
            old, self.opened = self.opened, None
            if old is not None:
                await _retire(old)

    async def reload(self) -> None:
        """Open the bundle as it is now beside the old engine, swap, and close that behind its last.

        No request is refused or lost meanwhile; where the new one does not open the old one stays.
        """
        async with self._turn:
            new = await asyncio.to_thread(self._open)
            old, self.opened = self.opened, new
            if old is not None:
                await _retire(old)


async def _retire(opened: Opened) -> None:
    await opened.idle.wait()
    await asyncio.to_thread(opened.close)


def _warm(bundle: Bundle, engine: Any) -> None:
    """Let the first request not be the one that compiles kernels."""
    task = bundle.task
    if task.modality == "text" and task.answer not in ("logits", "text"):
        one: Any = ("warm", "up") if task.takes == "pair" else "warm up"
        engine.answers([one])


class Host:
    """All models of a server.

    Args:
        models: name -> bundle folder.
        options: that every engine is opened with.

    Raises:
        BundleError: one of them is no bundle.
        ConfigurationError: there are none.
    """

    def __init__(
        self, models: Mapping[str, Path], limits: Capacity, options: Mapping[str, Any] | None = None
    ) -> None:
        if not models:
            raise ConfigurationError("no bundle to serve", fix="memopt serve BUNDLE")
        self.limits = limits
        self.models = {
            name: Hosted(name, path, dict(options or {}), limits) for name, path in models.items()
        }

    def find(self, name: str | None, able: Callable[[Task], bool], what: str) -> Hosted:
        """Return the model of that name, or the first that can do it where none is named.

        Raises:
            Refusal: 404 no such model, 400 it does something else.
        """
        if name:
            model = self.named(name)
            if not able(model.task):
                raise Refusal(
                    400, f"{name} gives {model.task.summary}", fix=f"{what} needs another"
                )
            return model
        for model in self.models.values():
            if able(model.task):
                return model
        raise Refusal(400, f"no model here for {what}", fix="serve a bundle that does it")

    def named(self, name: str) -> Hosted:
        """Return the model of that name.

        Raises:
            Refusal: 404, there is none.
        """
        model = self.models.get(name)
        if model is None:
            known = ", ".join(self.models)
            raise Refusal(404, f"no model {name!r}", kind="not_found_error",
                          fix=f"there are: {known}")  # fmt: skip
        return model

    @asynccontextmanager
    async def use(self, model: Hosted) -> AsyncIterator[Opened]:
        """Lend a model's engine, opened now if need be; it stays open until it is given back.

        Raises:
            Refusal: 503, memory is short and every other model is in use.
        """
        while (opened := model.opened) is None:
            await self._make_room(model)
            await model.open()
        opened.users += 1
        opened.idle.clear()
        model.used = time.monotonic()
        try:
            yield opened
        finally:
            opened.users -= 1
            if not opened.users:
                opened.idle.set()

    async def _make_room(self, wanted: Hosted) -> None:
        """Close models that nobody uses, the longest unused first, while memory is short."""
        limit = self.limits.memory_limit_mb
        if limit is None:
            return
        needed = _needed_mb(wanted.bundle)
        while resident_mb() + needed > limit:
            idle = [m for m in self.models.values() if m.opened and not m.opened.users]
            if not idle:
                raise Refusal(
                    503,
                    f"{wanted.name} needs about {needed:.0f} MB more, past {limit:.0f} MB",
                    kind="overloaded_error",
                    headers={"Retry-After": "5"},
                )
            await min(idle, key=lambda m: m.used).close()

    async def close(self) -> None:
        """Close every model behind its last request."""
        await asyncio.gather(*(model.close() for model in self.models.values()))


def _needed_mb(bundle: Bundle) -> float:
    """Return about how much opening takes: the largest variant's files and as much to work with."""
    sizes = [bundle.size(variant) for variant in bundle.manifest.variants.values()]
    return 2 * max(sizes, default=0) / 2**20
