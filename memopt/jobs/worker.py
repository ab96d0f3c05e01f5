"""One worker of a job: an engine that turns fragments into parts, wherever it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from memopt.errors import DeviceError
from memopt.jobs.parts import write_part
from memopt.jobs.reader import FragmentReader
from memopt.jobs.source import INDEX, VECTOR, Fragment, JobSource
from memopt.runtimes.configured import open_configured
from memopt.runtimes.embed import identity
from memopt.runtimes.engine import ArrowEngine
from memopt.runtimes.fallback import lacked_memory
from memopt.runtimes.inputs import Item
from memopt.runtimes.vectors import to_arrow


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedTask:
    """What every worker of a job does: plain values, sent to it as they are.

    ``parts`` is a folder or an URL that takes them; ``threads`` of None are all cores.
    """

    source: JobSource
    bundle: str
    parts: str
    kind: str
    device: str | None = None
    variant: str = "auto"
    strict: bool = False
    threads: int | None = None
    batch_size: int | None = None
    normalize: bool = True
    prompt: str | None = None
    prompt_name: str | None = None
    dimension: int | None = None


class FragmentWorker:
    """Reads, encodes and writes fragments; :meth:`run` may be called from several threads.

    Two fragments at once keep the engine busy: one is read, tokenised or written while the other
    is computed.

    Args:
        task: what to do.
        halvings: how often batches are halved, where a worker before found too little memory.
    """

    def __init__(self, task: EmbedTask, halvings: int = 0) -> None:
        self._task = task
        self._reader = FragmentReader(task.source)
        # A last batch of one input is encoded as the others are.
        opener = partial(ArrowEngine, threads=task.threads, one_variant=True, shares_cores=True)
        self._engine = open_configured(opener, task.bundle, task.device, task.variant, task.strict)
        self._how: dict[str, Any] = {
            "normalize": task.normalize,
            "prompt": self._engine.prompt(task.prompt, task.prompt_name),
            "dimension": self._engine.shortened(task.dimension),
        }
        self._batch_size = task.batch_size
        for _ in range(halvings):
            self._engine.halve_batches()
            if self._batch_size:
                self._batch_size = max(1, self._batch_size // 2)
        self._identity = identity(self._engine, self._how)

    def info(self) -> dict[str, Any]:
        """Return what decides about the vectors, and what runs where."""
        device = {k: v for k, v in self._engine.device_info().items() if k != "nodes"}
        return {"identity": self._identity, "device": device}

    def run(self, fragment: Fragment) -> dict[str, Any]:
        """Make the part of one fragment; return its note, to be committed.

        Raises:
            InputError: the source cannot be read any more.
            DeviceError: no provider is left, or another variant had to take over.
            MemoryError: too little memory, also for one row at a time.
        """
        table, items, where = self._reader.read(fragment)
        vectors, failures = self._encode(items)
        self._refuse_other_variant()
        rows = np.flatnonzero(~np.isin(np.arange(len(items)), list(failures)))
        written = write_part(
            self._task.kind, self._task.parts, fragment.number,
            _with_vectors(table, rows, fragment.first, vectors),
        )  # fmt: skip
        return {
            "first": fragment.first,
            "rows": fragment.rows,
            "vectors": len(rows),
            "failures": [
                {"index": fragment.first + at, "where": where[at], "reason": why}
                for at, why in sorted(failures.items())
            ],
            "events": sorted({str(event) for event in self._engine.events}),
            **written,
        }

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    def _refuse_other_variant(self) -> None:
        used, first = self._engine.device_info()["variant"], self._identity["variant"]
        if used == first:
            return
        for event in self._engine.events:
            # What took over has other vectors; a new worker with smaller batches has the same.
            if event.kind == "memory" and event.from_variant == first != event.to_variant:
                raise MemoryError(event.reason)
        raise DeviceError(
            f"variant {used} took over from {first}: their vectors differ",
            fix=f"begin anew with --variant {used}",
        )

    def _encode(self, items: Sequence[Item]) -> tuple[Any, dict[int, str]]:
        try:
            encoded = self._engine.encode_each(
                [item.value for item in items], batch_size=self._batch_size, **self._how
            )
        except DeviceError as error:
            # Not even one row fits beside what the batches before have left in this process.
            if lacked_memory(error):
                raise MemoryError(str(error)) from error
            raise
        return encoded.vectors, {
            at: items[at].problem or why for at, why in encoded.failures.items()
        }


def _with_vectors(table: Any, rows: Any, first: int, vectors: Any) -> Any:
    """Return the rows that have vectors, with their place in the source."""
    import pyarrow as pa

    if len(rows) < len(vectors):
        table, vectors = table.take(pa.array(rows)), np.ascontiguousarray(vectors[rows])
    table = table.append_column(INDEX, pa.array(rows + first, pa.int64()))
    # One chunk a column, so that the same rows are the same bytes however they were read.
    return table.append_column(VECTOR, to_arrow(vectors)).combine_chunks()
