"""One request and what answers it, whatever the route."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memopt.runtimes.batcher import Answered
from memopt.serve import work
from memopt.serve.hosting import Host, Hosted
from memopt.serve.telemetry import Telemetry
from memopt.tasks.table import Task

ARROW = "application/vnd.apache.arrow.stream"


@dataclass(slots=True, kw_only=True)
class Reply:
    """What goes back: one of these."""

    json: Any = None
    arrow: Sequence[Any] | None = None  # vectors of one length
    events: AsyncIterator[Any] | None = None  # JSON values, as server-sent events
    text: bytes | None = None
    media_type: str = "application/json"
    status: int = 200


@dataclass(slots=True, kw_only=True)
class Service:
    """What a route works with."""

    host: Host
    telemetry: Telemetry
    wants_arrow: bool = False
    client: str = ""  # the name of the API key that asks; its address where there are no keys
    memories: Any = None  # of /v1/memories; see memopt.serve.memories

    def find(self, name: str, able: Callable[[Task], bool], what: str) -> Hosted:
        """Return the model to ask; see :meth:`memopt.serve.hosting.Host.find`."""
        return self.host.find(name or None, able, what)

    async def answer(self, model: Hosted, verb: Any, items: Sequence[Any]) -> Answered:
        """Return a model's answers; see :func:`memopt.serve.work.answer`."""
        return await work.answer(self.host, self.telemetry, model, verb, items)
