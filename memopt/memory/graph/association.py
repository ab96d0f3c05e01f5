"""The association graph: what happened together, means the same, or is recalled together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memopt.errors import ConfigurationError
from memopt.memory.graph.neighbours import RowEdges, close_in_meaning, close_in_time
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.filters import EVERYTHING
from memopt.memory.model.rows import vectors_array, with_columns
from memopt.memory.model.schema import EDGES, Filter
from memopt.memory.store.links import seconds
from memopt.memory.store.observers import StoreObserver

TIME, SIMILARITY, CO_RETRIEVAL = "time", "similarity", "co_retrieval"
# Up to here the nearest memories of each new one are searched by the index, milliseconds each; more
# at once are compared among themselves, by cells. build() links everything.
_ONE_BY_ONE = 256
# Pairs remembered before co-retrieval is written: a commit costs as much as some searches.
MOST_PENDING_PAIRS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRecipe:
    """When two memories are linked, and how a link fades.

    Attributes:
        window_s: seconds within which memories belong to one moment.
        similarity: least cosine similarity of a link by meaning.
        most: links of each kind made per new memory.
        gain: what a memory recalled together with another adds to their link, at most to 1.
        half_life_days: after so long without renewal a link weighs half.
        floor: links weaker than this are dropped by :meth:`AssociationGraph.decay`.

    >>> GraphRecipe(similarity=2)
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: similarity 2 is not in (0, 1]; use 0.75
    """

    window_s: float = 300
    similarity: float = 0.75
    most: int = 8
    gain: float = 0.05
    half_life_days: float = 90
    floor: float = 0.05

    def __post_init__(self) -> None:
        for name, usual in (("similarity", 0.75), ("gain", 0.05), ("floor", 0.05)):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigurationError(
                    f"{name} {getattr(self, name)} is not in (0, 1]", fix=f"use {usual}"
                )
        for name in ("window_s", "most", "half_life_days"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} {getattr(self, name)} is not above 0")


class AssociationGraph(StoreObserver):
    """Keeps the ``edges`` table of a store in step with its memories.

    Made once per open store; from then on new memories are linked as they are added. (Links of
    deleted ones go with them, whether there is a graph or not.)

    Args:
        store: the store to keep in step.
        recipe: when memories are linked.

    >>> import tempfile
    >>> from memopt.memory import Content, MemoryStore, NewMemory
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> graph = AssociationGraph(store)
    >>> rows = [("a", [1, 0]), ("b", [1, 0.1]), ("c", [0, 1])]
    >>> new = [NewMemory(content=Content(text=t), embedding=np.array(v), memory_id=t)
    ...        for t, v in rows]
    >>> _ = store.add(new)
    >>> [link.linked_id for link in store.get("a").association_links]
    ['b', 'c']
    """

    def __init__(self, store: MemoryStore, recipe: GraphRecipe | None = None) -> None:
        self.recipe = recipe or GraphRecipe()
        self._database, self._reader, self._searcher = store.database, store.reader, store.searcher
        self.links = store.link_cache
        self._together: Counter[tuple[str, str]] = Counter()
        self._database.observers.add(self)

    def close(self) -> None:
        """Write what is buffered and stop following the store."""
        self.closing()
        self._database.observers.remove(self)

    # --- following the store ----------------------------------------------------------------

    def added(
        self, ids: Sequence[str], vectors: NDArray[np.float32], timestamps: Sequence[datetime]
    ) -> None:
        """Link new memories: by time with all, by meaning with all or, many at once, each other."""
        links = self._by_time(ids, timestamps)
        links.update(self._by_meaning(ids, vectors, links))
        self._write(links)

    def deleting(self, ids: Sequence[str]) -> None:
        """Forget what was counted of memories about to be deleted."""
        gone = set(ids)
        for pair in [pair for pair in self._together if gone.intersection(pair)]:
            del self._together[pair]

    def retrieved(self, ids: Sequence[str]) -> None:
        """Count that these came up together; written later, so that a search costs no commit."""
        for left, right in combinations(sorted(set(ids)), 2):
            self._together[left, right] += 1
        if len(self._together) > MOST_PENDING_PAIRS:
            self.closing()

    def closing(self) -> None:
        """Write the counted co-retrievals, where the store can be written."""
        self._database.keep_book(self.flush)

    def flush(self) -> None:
        """Write the counted co-retrievals."""
        counted, self._together = self._together, Counter()
        if not counted:
            return
        self._strengthen({pair: min(1.0, self.recipe.gain * n) for pair, n in counted.items()})

    # --- the whole graph --------------------------------------------------------------------

    def build(self, *, on_step: Callable[[str], None] | None = None) -> int:
        """Make all links by time and meaning anew; links by co-retrieval stay.

        Returns:
            Undirected links afterwards.
        """
        step = on_step or (lambda _: None)
        from lancedb.expr import col, lit

        columns = ["memory_id", "timestamp", "joint_embedding"]
        step("read")
        with self._database.changing():
            table = self._reader.table(EVERYTHING, columns, 8192)
            ids = table["memory_id"].to_pylist()
            if not ids:
                return 0
            vectors = vectors_array(table["joint_embedding"], self._database.dim)
            step("time")
            pairs = close_in_time(
                seconds(table["timestamp"]), self.recipe.window_s, self.recipe.most
            )
            links = _named(ids, pairs, TIME, {})
            step("meaning")
            pairs = close_in_meaning(vectors, self.recipe.similarity, self.recipe.most)
            links.update(_named(ids, pairs, SIMILARITY, links))
            step("write")
            edges = self._database.table("edges")
            edges.delete(col("kind") != lit(CO_RETRIEVAL))
            kept = edges.search().select(["source", "target"]).limit(None).to_arrow()
            for pair in zip(kept["source"].to_pylist(), kept["target"].to_pylist(), strict=True):
                links.pop(pair, None)
            self._write(links)
            return int(edges.count_rows() // 2)

    def decay(self) -> int:
        """Write the faded weights and drop links below the floor; return how many went."""
        with self._database.changing():
            edges = self._database.table("edges")
            table = edges.to_arrow()
            now = self._database.now()
            weights = self.faded(table["weight"].to_numpy(), seconds(table["updated_at"]), now)
            strong = weights.astype(np.float32) >= self.recipe.floor
            table = with_columns(table, weight=pa.array(weights, pa.float32()), updated_at=now)
            edges.add(table.filter(pa.array(strong)).cast(EDGES), mode="overwrite")
            return int((~strong).sum()) // 2

    def faded(
        self, weights: NDArray[Any], updated: NDArray[np.float64], now: datetime
    ) -> NDArray[np.float64]:
        """Return what weights written at ``updated`` (seconds) are worth ``now``."""
        days = np.maximum(0, now.timestamp() - updated) / 86_400
        return np.asarray(weights * 0.5 ** (days / self.recipe.half_life_days), np.float64)

    def around(self, ids: Sequence[str]) -> Around:
        """Return the links that leave ``ids``: sources, targets, weights as of now."""
        sources, targets, weights, updated = self.links.network()(ids)
        return sources, targets, self.faded(weights, updated, self._database.now())

    # --- how links are found and written ----------------------------------------------------

    def _by_time(self, ids: Sequence[str], timestamps: Sequence[datetime]) -> _Links:
        window = self.recipe.window_s
        where = Filter(
            since=_moved(min(timestamps), -window), until=_moved(max(timestamps), window)
        )
        fresh = [moment.timestamp() for moment in timestamps]
        table = self._reader.table(where, ["memory_id", "timestamp"], 8192)
        moments = seconds(table["timestamp"])
        known = dict(zip(table["memory_id"].to_pylist(), moments.tolist(), strict=True))
        for key in ids:
            known.pop(key, None)
        names = [*known, *ids]
        moments = np.array([*known.values(), *fresh])
        pairs = close_in_time(moments, self.recipe.window_s, self.recipe.most, after=len(known))
        return _named(names, pairs, TIME, {})

    def _by_meaning(
        self, ids: Sequence[str], vectors: NDArray[np.float32], known: _Links
    ) -> _Links:
        recipe = self.recipe
        if len(ids) > _ONE_BY_ONE:
            pairs = close_in_meaning(vectors, recipe.similarity, recipe.most)
            return _named(ids, pairs, SIMILARITY, known)
        links: _Links = {}
        near = self._searcher.candidates(list(vectors), where=EVERYTHING, top_k=recipe.most + 1)
        for key, others in zip(ids, near, strict=True):
            for other, similar in others:
                pair = _ordered(key, other)
                weaker = similar <= known.get(pair, (recipe.similarity,))[0]
                if other != key and similar > recipe.similarity and not weaker:
                    links[pair] = (similar, SIMILARITY)
        return links

    def _write(self, links: _Links) -> None:
        """Append new links, both directions, where both memories are there."""
        with self._database.changing():
            links = self._living(links)
            if links:
                table = _table(links, self._database.now())
                with self.links.following(table):
                    self._database.table("edges").add(table)

    def _strengthen(self, gains: Mapping[tuple[str, str], float]) -> None:
        """Add to the weight of links, making those that are not there."""
        with self._database.changing():
            links = self._living({pair: (gain, CO_RETRIEVAL) for pair, gain in gains.items()})
            if not links:
                return
            sources, targets, weights = self.around(sorted({pair[0] for pair in links}))
            for source, target, weight in zip(sources, targets, weights.tolist(), strict=True):
                if (source, target) in links:
                    gain = links[source, target][0]
                    links[source, target] = (min(1.0, weight + gain), CO_RETRIEVAL)
            table = _table(links, self._database.now())
            merge = self._database.table("edges").merge_insert(["source", "target"])
            merge = merge.when_matched_update_all().when_not_matched_insert_all()
            with self.links.following(table):
                merge.execute(table)

    def _living(self, links: _Links) -> _Links:
        there = self._database.existing(list({name for pair in links for name in pair}))
        return {pair: link for pair, link in links.items() if set(pair) <= there}


Around = tuple[list[str], list[str], NDArray[np.float64]]
_Links = dict[tuple[str, str], tuple[float, str]]


def _ordered(left: str, right: str) -> tuple[str, str]:
    return (left, right) if left < right else (right, left)


def _moved(moment: datetime, seconds: float) -> datetime | None:
    """Return a moment so much later; None past the calendar's end, where no memory can be."""
    try:
        return moment + timedelta(seconds=seconds)
    except OverflowError:
        return None


def _named(names: Sequence[str], pairs: RowEdges, kind: str, known: _Links) -> _Links:
    """Return links by name; where one is known already the stronger stays."""
    links: _Links = {}
    for left, right, weight in zip(
        pairs.left.tolist(), pairs.right.tolist(), pairs.weight.tolist(), strict=True
    ):
        pair = _ordered(names[left], names[right])
        if weight > max(known.get(pair, (0.0,))[0], links.get(pair, (0.0,))[0]):
            links[pair] = (weight, kind)
    return links


def _table(links: _Links, now: datetime) -> pa.Table:
    left = [pair[0] for pair in links]
    right = [pair[1] for pair in links]
    weights = [link[0] for link in links.values()]
    kinds = [link[1] for link in links.values()]
    columns: Iterable[Any] = (
        left + right,
        right + left,
        weights * 2,
        kinds * 2,
        [now] * (2 * len(links)),
    )
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, EDGES, strict=True)],
        schema=EDGES,
    )
