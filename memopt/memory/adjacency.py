"""The links of a store held in memory, so that following them costs no query."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.memory.store import MemoryStore

# Directed links held at most: 16 bytes each and the ids once, some 100 MB. A larger graph is asked
# link by link.
MOST_LINKS = 4_000_000
# Own links since the last reading: past this many (and a tenth of all) they are read anew.
MOST_NEW = 10_000
# After reading for t seconds none starts for 20 t: several writers must not cost more than that.
_REST = 20

Around = tuple[list[str], list[str], "NDArray[np.float64]", "NDArray[np.float64]"]


@dataclass(frozen=True, slots=True)
class _Links:
    """Links sorted by source (compressed sparse rows) as one version of the table has them."""

    version: int
    at: dict[str, int]
    names: list[str]
    starts: NDArray[np.int64]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    updated: NDArray[np.float64]


class Adjacency:
    """Answers who is linked to whom from memory while that is what the table says.

    Links this process writes are followed. When another process wrote, the answer is None until
    a thread has read the table anew; the caller then asks the table.

    Args:
        store: the store whose ``edges`` are held.
    """

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self._guard = threading.Lock()
        self._links: _Links | None = None
        self._new: dict[str, list[tuple[str, float, float]]] = {}
        self._count = 0
        self._gone: set[str] = set()
        self._thread: threading.Thread | None = None
        self._rest_until = 0.0

    def current(self) -> Callable[[Sequence[str]], Around] | None:
        """Return ids -> the links that leave them; None where the table has to be asked.

        Links come as sources, targets, weights as written, and when (s); one may come twice, as it
        was and as it was strengthened since.
        """
        version = self.store.version("edges")
        with self._guard:
            links = self._links
            if links is None or links.version != version:
                self._start_reading()
                return None
            return partial(self._found, links)

    def follow(
        self, before: int, after: int, added: pa.Table | None, gone: Iterable[str] = ()
    ) -> None:
        """Take in what this process wrote under the writer lock.

        Args:
            before: version of the table before the write.
            after: version after it.
            added: new links, or links as they are now.
            gone: memories all of whose links went.
        """
        with self._guard:
            links = self._links
            # Only under a writer lock is it sure that nobody else wrote in between.
            if links is None or links.version != before or self.store.place.local is None:
                return
            self._forget(set(gone))
            if added is not None:
                rows = zip(
                    added["source"].to_pylist(),
                    added["target"].to_pylist(),
                    added["weight"].to_pylist(),
                    seconds(added["updated_at"]).tolist(),
                    strict=True,
                )
                for source, target, weight, moment in rows:
                    self._new.setdefault(source, []).append((target, weight, moment))
                self._count += len(added)
            self._links = replace(links, version=after)
            if self._count > max(MOST_NEW, len(links.targets) // 10):
                self._start_reading()

    def close(self) -> None:
        """Wait for a reading in progress."""
        if self._thread is not None:
            self._thread.join()

    def read(self) -> None:
        """Read the table; without effect when it is too large or changes meanwhile."""
        begin = time.monotonic()
        version = self.store.version("edges")
        links = _read(self.store, version)
        if links is not None and self.store.version("edges") == version:
            with self._guard:
                self._links, self._new, self._gone, self._count = links, {}, set(), 0
        self._rest_until = time.monotonic() + _REST * (time.monotonic() - begin)

    def _found(self, links: _Links, ids: Sequence[str]) -> Around:
        with self._guard:
            return self._gather(links, ids)

    def _gather(self, links: _Links, ids: Sequence[str]) -> Around:
        sources: list[str] = []
        targets: list[str] = []
        weights, updated = [np.zeros(0, np.float32)], [np.zeros(0)]
        late: list[tuple[float, float]] = []
        for source in ids:
            row = links.at.get(source)
            if row is not None and source not in self._gone:
                part = np.arange(links.starts[row], links.starts[row + 1])
                names = [links.names[at] for at in links.targets[part].tolist()]
                if self._gone:
                    part = part[[name not in self._gone for name in names]]
                    names = [name for name in names if name not in self._gone]
                sources += [source] * len(names)
                targets += names
                weights.append(links.weights[part])
                updated.append(links.updated[part])
        for source in ids:
            for target, weight, moment in self._new.get(source, ()):
                sources.append(source)
                targets.append(target)
                late.append((weight, moment))
        if late:
            weights.append(np.array([weight for weight, _ in late], np.float32))
            updated.append(np.array([moment for _, moment in late]))
        return sources, targets, np.concatenate(weights).astype(float), np.concatenate(updated)

    def _forget(self, gone: set[str]) -> None:
        """Drop links of deleted memories; one that is added again starts with its new links."""
        self._gone |= gone
        for name in gone:
            for other, _, _ in self._new.pop(name, ()):
                self._new[other] = [link for link in self._new.get(other, ()) if link[0] != name]

    def _start_reading(self) -> None:
        busy = self._thread is not None and self._thread.is_alive()
        if not busy and time.monotonic() >= self._rest_until:
            self._thread = threading.Thread(
                target=self._read_quietly, name="memopt-links", daemon=True
            )
            self._thread.start()

    def _read_quietly(self) -> None:
        try:
            self.read()
        except Exception as error:  # noqa: BLE001 - the table still answers, only slower
            self.store.event("links-not-read", f"{type(error).__name__}: {error}"[:500])
            self._rest_until = time.monotonic() + 60


def seconds(column: pa.Array | pa.ChunkedArray) -> NDArray[np.float64]:
    """Return timestamps (us) as seconds since 1970, float64."""
    return np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False) / 1e6, np.float64)


def _read(store: MemoryStore, version: int) -> _Links | None:
    edges = store.table("edges")
    if edges.count_rows() > MOST_LINKS:
        return None
    at: dict[str, int] = {}
    parts: list[tuple[NDArray[Any], ...]] = []
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
    if not parts:
        nothing = np.zeros(0, np.int32)
        starts = np.zeros(1, np.int64)
        return _Links(version, {}, [], starts, nothing, np.zeros(0, np.float32), np.zeros(0))
    sources, targets, weights, updated = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(sources, kind="stable")
    starts = np.searchsorted(sources[order], np.arange(len(at) + 1))
    return _Links(version, at, list(at), starts, targets[order], weights[order], updated[order])


def _rows(column: pa.Array, at: dict[str, int]) -> NDArray[np.int32]:
    """Return the row of each id, giving new ids the next ones."""
    encoded = column.dictionary_encode()
    known = [at.setdefault(name, len(at)) for name in encoded.dictionary.to_pylist()]
    rows = np.array(known, np.int32)[encoded.indices.to_numpy()]
    return np.asarray(rows, np.int32)
