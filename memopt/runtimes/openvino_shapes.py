"""OpenVINO graphs of one shape each, compiled beside the work when their shape comes often.

A graph of a free shape pays 1.5 to 3 ms (a MiniLM, two cores) for every shape that is not the last
one, and is slower on each than a graph that was compiled for it.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from memopt.runtimes.segments import ROW, together

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memopt.runtimes.base import Feed, Rows

_LOG = logging.getLogger(__name__)
# Rows of the graphs compiled for short texts, the largest number first.
HEIGHTS = (4, 1)


class Graph(Protocol):
    """A compiled model, shared by those that use it."""

    def infer(self, inputs: list[Any]) -> Rows: ...

    def drop(self) -> None: ...


class FixedShapes:
    """Graphs compiled, beside the work, for the shapes that come most often.

    Args:
        compile_for: makes the graph of a shape.
        before: how often a shape comes before it gets one.
        most: how many get one.
    """

    def __init__(
        self, compile_for: Callable[[tuple[int, ...]], Graph], before: int, most: int
    ) -> None:
        self._compile_for = compile_for
        self._before, self._most = before, most
        self._lock = threading.Lock()
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._ready: dict[tuple[int, ...], Graph] = {}
        self._thread: threading.Thread | None = None

    def get(self, shape: tuple[int, ...]) -> Graph | None:
        """Return the graph of a shape; None while there is none."""
        found = self._ready.get(shape)
        if found is not None or len(self._ready) >= self._most:
            return found
        with self._lock:
            self._seen[shape] += 1
            busy = self._thread is not None and self._thread.is_alive()
            if self._seen[shape] >= self._before and not busy:
                # Counted from the start again if it fails.
                self._seen[shape] = 0
                self._thread = threading.Thread(target=self._make, args=(shape,), daemon=True)
                self._thread.start()
        return None

    def _make(self, shape: tuple[int, ...]) -> None:
        try:
            self._ready[shape] = self._compile_for(shape)
        except Exception as error:  # noqa: BLE001 - the graph of any shape answers as before
            _LOG.warning("no graph for inputs of shape %s: %s", shape, error)

    def close(self) -> None:
        """Wait for a graph being made and forget all."""
        if self._thread is not None:
            self._thread.join()
        for graph in self._ready.values():
            graph.drop()


class SharedRows:
    """Runs batches of short texts in rows that they share.

    Args:
        inputs: names of the graph's inputs, in order.
        heights: how many rows there are graphs for, the largest number first, the last 1.
        shapes: graphs of a few numbers of rows; None where each is too large to have twice.
    """

    def __init__(
        self, inputs: Sequence[str], heights: tuple[int, ...], shapes: FixedShapes | None
    ) -> None:
        self._inputs = inputs
        self._heights = heights
        self._shapes = shapes

    def infer(self, free: Graph, feed: Feed) -> Rows:
        """Return the vectors of a batch, on the graph of any shape until there are others.

        Args:
            free: the graph of any shape.
            feed: of which :func:`memopt.runtimes.segments.sharing` says that it can be.
        """
        packed, order = together(feed, ROW)
        arrays = [packed[name] for name in self._inputs]
        vectors = np.concatenate(
            [
                graph.infer([array[start:stop] for array in arrays])
                for graph, start, stop in self._parts(free, len(arrays[0]))
            ]
        )
        rows = np.empty_like(vectors)
        rows[order] = vectors
        return rows

    def _parts(self, free: Graph, rows: int) -> list[tuple[Graph, int, int]]:
        """Return which graph runs which rows: all the free one, until there are all others."""
        graphs = {h: self._shapes.get((h, ROW)) if self._shapes else None for h in self._heights}
        ready = {height: graph for height, graph in graphs.items() if graph is not None}
        if len(ready) < len(graphs):
            return [(free, 0, rows)]
        parts, start = [], 0
        while start < rows:
            height = next(h for h in ready if h <= rows - start)
            parts.append((ready[height], start, start + height))
            start += height
        return parts

    def close(self) -> None:
        """Drop the graphs."""
        if self._shapes is not None:
            self._shapes.close()
