"""Which memories stay at hand: those used lately, and those near to what is being worked on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memopt.errors import ConfigurationError, ConsolidationError
from memopt.extras import require
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.filters import id_list
from memopt.memory.model.rows import chunks, with_columns
from memopt.memory.model.schema import ARCHIVED, LONG_TERM, SHORT_TERM, Filter

# Memories whose words say what is being worked on: the most recently used ones.
_FOCUS = 32
_ROWS_PER_COMMIT = 1024


@dataclass(frozen=True, slots=True)
class Ranked:
    """A memory's worth at hand: ``score`` mixes ``recency`` and ``relevance``, all 0..1."""

    memory_id: str
    tier: str
    score: float
    recency: float
    relevance: float


@dataclass(frozen=True, slots=True)
class Moves:
    """What :meth:`HotColdTiering.rebalance` moved."""

    archived: tuple[str, ...]
    recalled: tuple[str, ...]


class HotColdTiering:
    """Ranks memories by use and by words, and moves them between short term and archive.

    Recency is the rank by last access (LRU; by timestamp where never accessed): 1 for the latest,
    towards 0 for the oldest. Relevance is the cosine of TF-IDF vectors (Salton & Buckley 1988) of
    a memory's text to the query, or, without one, to the mean of those used last.

    Args:
        store: whose memories.
        recency, relevance: weights, which sum to 1.

    >>> import tempfile
    >>> from memopt.memory import Content, MemoryStore, NewMemory
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> new = [NewMemory(content=Content(text=t), embedding=np.ones(2), memory_id=t)
    ...        for t in ("a red door", "a blue lake")]
    >>> _ = store.add(new)
    >>> tiers = HotColdTiering(store)
    >>> tiers.rank(query="lake")[0].memory_id
    'a blue lake'
    >>> tiers.archive(["a red door"]), store.get("a red door").text, tiers.recall(["a red door"])
    (1, 'a red door', 1)
    """

    def __init__(self, store: MemoryStore, *, recency: float = 0.6, relevance: float = 0.4) -> None:
        if recency < 0 or relevance < 0 or abs(recency + relevance - 1) > 1e-6:
            raise ConfigurationError(
                f"weights {recency} and {relevance} do not sum to 1", fix="use 0.6 and 0.4"
            )
        self.store, self._recency, self._relevance = store, recency, relevance

    def rank(self, query: str | None = None, where: Filter | None = None) -> list[Ranked]:
        """Return every memory that passes ``where``, worth most first; ties by id.

        Args:
            query: what is being worked on; by default what was used last says it.
            where: by default short-term and archived ones.
        """
        where = where or Filter(tiers=(SHORT_TERM, ARCHIVED))
        columns = ["memory_id", "tier", "timestamp", "last_access", "text", "summary"]
        ids: list[str] = []
        tiers: list[str] = []
        texts: list[str] = []
        used: list[float] = []
        # Whatever a wrong clock dated later than now was used just now at the latest.
        now = self.store.database.now().timestamp()
        # Media are read only of packed rows, where they share a cell with the text.
        for batch in self.store.scan(where, [*columns, "codec", "packed"], 256):
            table = self.store.cells.unpack(pa.Table.from_batches([batch]))
            for row in table.select(columns).to_pylist():
                ids.append(row["memory_id"])
                tiers.append(row["tier"])
                texts.append(" ".join(filter(None, (row["text"], row["summary"]))))
                used.append(min(now, (row["last_access"] or row["timestamp"]).timestamp()))
        if not ids:
            return []
        recency, relevance = recency_and_relevance(np.array(used), texts, query)
        score = self._recency * recency + self._relevance * relevance
        order = sorted(range(len(ids)), key=lambda at: (-score[at], ids[at]))
        return [
            Ranked(ids[at], tiers[at], float(score[at]), float(recency[at]), float(relevance[at]))
            for at in order
        ]

    def rebalance(self, keep: int, query: str | None = None) -> Moves:
        """Keep the ``keep`` best at hand: archive the others, recall archived ones among the best.

        Archived originals of a summary stay where they are: their summary is at hand.
        """
        if keep < 0:
            raise ConfigurationError(f"keep {keep} is below 0")
        ranked = self.rank(query)
        archived = [found.memory_id for found in ranked if found.tier == ARCHIVED]
        condensed = {
            row["memory_id"]
            for row in self.store.database.light(
                archived, ["memory_id", "consolidated_at"]
            ).to_pylist()
            if row["consolidated_at"] is not None
        }
        ranked = [found for found in ranked if found.memory_id not in condensed]
        best, rest = ranked[:keep], ranked[keep:]
        out = [found.memory_id for found in rest if found.tier == SHORT_TERM]
        back = [found.memory_id for found in best if found.tier == ARCHIVED]
        self.archive(out)
        self.recall(back)
        return Moves(tuple(out), tuple(back))

    def archive(self, ids: Sequence[str]) -> int:
        """Compress memories and move them to the archive; return how many were not there yet.

        Raises:
            ConsolidationError: an id is unknown, or a summary, which stays at hand.
        """
        return self._move(ids, ARCHIVED)

    def recall(self, ids: Sequence[str]) -> int:
        """Bring archived memories back to short term; return how many were archived.

        Raises:
            ConsolidationError: an id is unknown, or a summary.
        """
        return self._move(ids, SHORT_TERM)

    def _move(self, ids: Sequence[str], tier: str) -> int:
        moved_rows = 0
        for part in chunks(list(dict.fromkeys(id_list(ids))), _ROWS_PER_COMMIT):
            # Read, changed and written under the lock: no other writer's change is overwritten.
            with self.store.database.exclusive():
                rows = self.store.rows(part)
                missing = sorted(set(part) - set(rows["memory_id"].to_pylist()))
                if missing:
                    raise ConsolidationError(f"{self.store.place} has no memory {missing[0]!r}")
                now = rows["tier"].to_pylist()
                if LONG_TERM in now:
                    found = rows["memory_id"][now.index(LONG_TERM)].as_py()
                    raise ConsolidationError(f"{found!r} is a summary", fix="leave it out")
                rows = rows.filter(pa.array([other != tier for other in now], pa.bool_()))
                if not rows.num_rows:
                    continue
                changed = with_columns(self.store.cells.unpack(rows), tier=tier)
                if tier == ARCHIVED:
                    changed = self.store.cells.pack(changed)
                self.store.commit(updates=changed)
                moved_rows += rows.num_rows
        return moved_rows


def recency_and_relevance(
    used: NDArray[np.float64], texts: list[str], query: str | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what :class:`HotColdTiering` weighs, each (n,) in 0..1.

    Args:
        used: when each was used last, in seconds since 1970.
        texts: their words.
        query: what is being worked on; None lets those used last say it.
    """
    recency = _lru(used)
    return recency, _tfidf(texts, query, np.argsort(-recency, kind="stable")[:_FOCUS])


def _lru(used: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of each moment, 1 for the latest, equal ones alike."""
    _, rank = np.unique(used, return_inverse=True)
    return np.asarray((rank + 1) / (rank.max() + 1), np.float64)


def _tfidf(texts: list[str], query: str | None, focus: NDArray[np.int64]) -> NDArray[np.float64]:
    text = require("sklearn.feature_extraction.text", extra="memory", why="rank memories")
    vectorizer = text.TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+")
    try:
        matrix: Any = vectorizer.fit_transform(texts)
    except ValueError:  # no words in any of them
        return np.zeros(len(texts))
    if query is not None:
        target = vectorizer.transform([query]).toarray()[0]
    else:
        target = np.asarray(matrix[focus].mean(axis=0)).ravel()
    length = np.linalg.norm(target)
    if not length:
        return np.zeros(len(texts))
    similar: NDArray[np.float64] = np.clip(np.asarray(matrix @ (target / length)).ravel(), 0, 1)
    return similar
