"""The links of a store held in memory, so that following them costs no query."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from memopt.background import BackgroundTask
from memopt.memory.model.filters import one_of
from memopt.memory.model.schema import EDGES
from memopt.memory.store.database import Database
from memopt.memory.store.events import Events
from memopt.memory.store.links import Leaving, Network, QueriedLinks, numbered, seconds
from memopt.memory.store.observers import StoreObserver

# Directed links held at most: 16 bytes each and the ids once, some 200 MB. A larger graph is asked
# link by link.
MOST_LINKS = 8_000_000
# Own links since the last reading: past this many (and a tenth of all) they are read anew.
MOST_NEW = 10_000
# After reading for t seconds none starts for 20 t: several writers must not cost more than that.
_REST = 20
# The row id of a memory that was not seen.
_NOWHERE = np.iinfo(np.uint64).max


@dataclass(frozen=True, slots=True)
class _Links:
    """Links as one version of the table has them.

    Those that were read are sorted by source (compressed sparse rows). A memory is a node: its
    place in ``names``; those linked since come after the nodes that have ``starts``.

    Attributes:
        row_ids: where each node's row of ``memories`` lay when the links were read.
        new: node -> links written since.
        gone: nodes none of whose links that were read counts any more.
    """

    version: int
    at: dict[str, int]
    names: list[str]
    row_ids: NDArray[np.uint64]
    starts: NDArray[np.int64]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    updated: NDArray[np.float64]
    new: dict[int, list[tuple[int, float, float]]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)


class LinkCache(StoreObserver):
    """Answers who is linked to whom from memory while that is what the table says.

    Links this process writes are followed. When another process wrote, the answer is None until
    a thread has read the table anew; the caller then asks the table.

    Args:
        database: whose ``edges`` are held.
        events: told where they cannot be read.
    """

    def __init__(self, database: Database, events: Events) -> None:
        self._database, self._events = database, events
        self._guard = threading.Lock()
        self._links: _Links | None = None
        self._count = 0
        self._task = BackgroundTask(self.read, "memopt-links", on_error=self._failed)
        self._rest_until = 0.0

    def network(self) -> Network:
        """Return all links for several steps in a row, from memory where it is up to date."""
        return self.current() or QueriedLinks(self._database)

    def current(self) -> CachedLinks | None:
        """Return the links as they are now; None where the table has to be asked."""
        version = self._database.version("edges")
        with self._guard:
            links = self._links
            if links is None or links.version != version:
                self._start_reading()
                return None
            return CachedLinks(links, self._guard)

    @contextmanager
    def following(self, added: pa.Table | None = None) -> Iterator[None]:
        """Take in links that the block writes under the writer lock.

        Args:
            added: new links, or links as they are now; none where the block only moves them.
        """
        before = self._database.version("edges")
        yield
        after = self._database.version("edges")
        self._follow(before, after, EDGES.empty_table() if added is None else added)

    def _follow(self, before: int, after: int, added: pa.Table) -> None:
        with self._guard:
            links = self._followed(before)
            if links is None:
                return
            rows = zip(
                numbered(added["source"].to_pylist(), links.at, links.names),
                numbered(added["target"].to_pylist(), links.at, links.names),
                added["weight"].to_pylist(),
                seconds(added["updated_at"]).tolist(),
                strict=True,
            )
            for source, target, weight, moment in rows:
                links.new.setdefault(source, []).append((target, weight, moment))
            self._count += len(added)
            self._links = replace(links, version=after)
            if self._count > max(MOST_NEW, len(links.targets) // 10):
                self._start_reading()

    def deleting(self, ids: Sequence[str]) -> None:
        """Delete every link of memories about to be deleted; under the writer lock."""
        database = self._database
        before = database.version("edges")
        linked = one_of("source", ids) | one_of("target", ids)
        if not database.fetch(database.query("edges").where(linked).limit(1)).num_rows:
            return
        database.table("edges").delete(linked)
        after = database.version("edges")
        with self._guard:
            links = self._followed(before)
            if links is None:
                return
            # One that is added again starts with its new links.
            gone = {links.at[key] for key in ids if key in links.at}
            links.gone.update(gone)
            for node in gone:
                for other, _, _ in links.new.pop(node, ()):
                    kept = [link for link in links.new.get(other, ()) if link[0] != node]
                    links.new[other] = kept
            self._links = replace(links, version=after)

    def closing(self) -> None:
        """Wait for a reading in progress."""
        self._task.close()

    def read(self) -> None:
        """Read the table; without effect when it is too large or changes meanwhile."""
        begin = time.monotonic()
        version = self._database.version("edges")
        links = _read(self._database, version)
        if links is not None and self._database.version("edges") == version:
            with self._guard:
                self._links, self._count = links, 0
        self._rest_until = time.monotonic() + _REST * (time.monotonic() - begin)

    def refresh(self) -> None:
        """Read the table in a thread, unless that was done just now."""
        with self._guard:
            self._start_reading()

    def _followed(self, before: int) -> _Links | None:
        links = self._links
        # Only under a writer lock is it sure that nobody else wrote in between.
        local = self._database.place.local is not None
        return links if links is not None and links.version == before and local else None

    def _start_reading(self) -> None:
        if time.monotonic() >= self._rest_until:
            self._task.start()

    def _failed(self, error: Exception) -> None:
        # The table still answers, only slower.
        self._events.record("links-not-read", f"{type(error).__name__}: {error}"[:500])
        self._rest_until = time.monotonic() + 60


class CachedLinks(Network):
    """Links in memory."""

    def __init__(self, links: _Links, guard: threading.Lock) -> None:
        self._links, self._guard = links, guard

    def nodes(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the node of each id, -1 where it has no link."""
        return np.array([self._links.at.get(key, -1) for key in ids], np.int64)

    def names(self, nodes: NDArray[np.int64]) -> list[str]:
        """Return the id of each node."""
        return [self._links.names[node] for node in nodes.tolist()]

    def row_ids(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the row ids of those that were linked when the links were read."""
        nodes = self.nodes(ids)
        known = (nodes >= 0) & (nodes < len(self._links.row_ids))
        found = np.full(len(ids), _NOWHERE, np.uint64)
        found[known] = self._links.row_ids[nodes[known]]
        pairs = zip(ids, found.tolist(), strict=True)
        return {key: row_id for key, row_id in pairs if row_id != _NOWHERE}

    def leaving(self, nodes: NDArray[np.int64]) -> Leaving:
        """Return the links that leave ``nodes``."""
        links = self._links
        with self._guard:
            gone = np.fromiter(links.gone, np.int64)
            late = [
                (place, *link)
                for place, node in enumerate(nodes.tolist() if links.new else ())
                for link in links.new.get(node, ())
            ]
        read = (nodes >= 0) & (nodes < len(links.starts) - 1) & ~np.isin(nodes, gone)
        begin = links.starts[nodes[read]]
        counts = links.starts[nodes[read] + 1] - begin
        # For each link, the start of its row plus its place within that row.
        at = np.repeat(begin - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        places, targets = np.repeat(np.flatnonzero(read), counts), links.targets[at].astype(int)
        weights, updated = links.weights[at].astype(float), links.updated[at]
        if len(gone):
            kept = ~np.isin(targets, gone)
            places, targets = places[kept], targets[kept]
            weights, updated = weights[kept], updated[kept]
        if not late:
            return places, targets, weights, updated
        more = np.array(late, float).T
        return (
            np.concatenate([places, more[0].astype(int)]),
            np.concatenate([targets, more[1].astype(int)]),
            np.concatenate([weights, more[2]]),
            np.concatenate([updated, more[3]]),
        )


def _read(database: Database, version: int) -> _Links | None:
    edges = database.table("edges")
    if edges.count_rows() > MOST_LINKS:
        return None
    at: dict[str, int] = {}
    nothing = np.zeros(0, np.int32)
    parts: list[tuple[NDArray[Any], ...]] = [
        (nothing, nothing, np.zeros(0, np.float32), np.zeros(0))
    ]
    columns = ["source", "target", "weight", "updated_at"]
    for batch in edges.search().select(columns).limit(None).to_batches(65_536):
        parts.append(
            (
                _rows(batch["source"], at),
                _rows(batch["target"], at),
                batch["weight"].to_numpy(),
                seconds(batch["updated_at"]),
            )
        )
    sources, targets, weights, updated = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(sources, kind="stable")
    starts = np.searchsorted(sources[order], np.arange(len(at) + 1))
    return _Links(
        version=version,
        at=at,
        names=list(at),
        row_ids=_row_ids(database, list(at)),
        starts=starts,
        targets=targets[order],
        weights=weights[order],
        updated=updated[order],
    )


def _row_ids(database: Database, names: list[str]) -> NDArray[np.uint64]:
    """Return Lance's row id of each memory; looked for by Arrow, which holds no other thread up."""
    seen = database.fetch(database.query().select(["memory_id"]).with_row_id())
    found = np.full(len(names), _NOWHERE, np.uint64)
    if names and seen.num_rows:
        places = pc.index_in(seen["memory_id"], value_set=pa.array(names, pa.string()))
        linked = places.is_valid().to_numpy()
        found[places.drop_null().to_numpy()] = seen["_rowid"].to_numpy()[linked]
    return found


def _rows(column: pa.Array, at: dict[str, int]) -> NDArray[np.int32]:
    """Return the node of each id, giving new ids the next ones."""
    encoded = column.dictionary_encode()
    known = [at.setdefault(name, len(at)) for name in encoded.dictionary.to_pylist()]
    rows = np.array(known, np.int32)[encoded.indices.to_numpy()]
    return np.asarray(rows, np.int32)
