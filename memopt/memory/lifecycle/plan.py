"""What a consolidation is to do: which memories are hot or cold, and which belong together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memopt.errors import ConfigurationError
from memopt.memory.graph.neighbours import close_in_meaning
from memopt.memory.lifecycle.tiering import HotColdTiering
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.filters import unexpired
from memopt.memory.model.rows import vectors_array
from memopt.memory.model.schema import SHORT_TERM, Filter

# The event of a batch that failed.
FAILED = "consolidation-failed"
# A failure is tried again after retry_s, then twice as long each time, a day at most.
LONGEST_BACKOFF = 86_400.0
_COLUMNS = (
    "memory_id",
    "joint_embedding",
    "timestamp",
    "access_count",
    "category",
    "expires_at",
    "consolidated_at",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsolidationRecipe:
    """What is condensed, and how.

    Attributes:
        hot_accesses: memories read this often are summarised with those that say the same.
        cold_age_days: others are archived when they are that old.
        at_hand: short-term memories at most: of more, those worth least are archived as well, by
            use and by what is being worked on (:class:`memopt.memory.HotColdTiering`).
        similarity: least cosine similarity of a group's members to its centre.
        batch_size: memories per summary at most.
        originals: what happens to those a summary stands for: 'archive' or 'drop'. What has a
            picture or a sound is archived either way.
        fidelity: least cosine similarity of a summary to its sources' centroid.
        summary_length: characters of a summary at most.
        retry_s: seconds until a failed batch is tried again, the first time.
        compact: keep vectors in a quarter of the room, where search finds the same by them
            (:mod:`memopt.memory.model.signs`).
        duty: share of the time to be at work; the rest is left to readers. Waiting for a language
            model is no work. With 5 % and more the slowest twentieth of searches would all be some
            that met it.

    >>> ConsolidationRecipe(originals="burn")
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: originals 'burn' is neither 'archive' nor 'drop'
    """

    hot_accesses: int = 10
    cold_age_days: float = 30
    at_hand: int | None = None
    similarity: float = 0.8
    batch_size: int = 50
    originals: Literal["archive", "drop"] = "archive"
    fidelity: float = 0.7
    summary_length: int = 500
    retry_s: float = 3600
    compact: bool = True
    duty: float = 0.03

    def __post_init__(self) -> None:
        if self.originals not in ("archive", "drop"):
            raise ConfigurationError(
                f"originals {self.originals!r} is neither 'archive' nor 'drop'"
            )
        for name in ("similarity", "fidelity", "duty"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} {getattr(self, name)} is not in (0, 1]")
        for name in ("hot_accesses", "cold_age_days", "summary_length", "retry_s"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} {getattr(self, name)} is not above 0")
        if self.at_hand is not None and self.at_hand < 0:
            raise ConfigurationError(f"at_hand {self.at_hand} is below 0")
        if self.batch_size < 2:
            raise ConfigurationError(f"batch_size {self.batch_size} is below 2")


@dataclass(frozen=True, slots=True)
class Group:
    """Memories of one category and one expiry that say nearly the same."""

    ids: tuple[str, ...]
    category: str
    expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsolidationPlan:
    """What a consolidation would do.

    Attributes:
        scanned: short-term memories.
        hot, cold: how many of each; hot ones are never cold.
        groups: to be summarised, each in one commit.
        archive: cold ids, oldest first, then those worth least.
        alone: hot memories like no other; they stay as they are.
        postponed: ids of failed batches whose time to retry has not come.
    """

    scanned: int = 0
    hot: int = 0
    cold: int = 0
    groups: tuple[Group, ...] = ()
    archive: tuple[str, ...] = ()
    alone: int = 0
    postponed: int = 0


def make_plan(store: MemoryStore, recipe: ConsolidationRecipe) -> ConsolidationPlan:
    """Scan the short-term memories and say what is to be done."""
    now, cold_age = store.database.now(), timedelta(days=recipe.cold_age_days)
    postponed = _postponed(store, now)
    table = store.reader.table(Filter(tiers=(SHORT_TERM,)), _COLUMNS)
    if not table.num_rows:
        return ConsolidationPlan()
    ids: list[str] = table["memory_id"].to_pylist()
    alive = unexpired(table["expires_at"], now).to_numpy()
    free = alive & np.array([memory_id not in postponed for memory_id in ids], bool)
    counts = table["access_count"].to_numpy()
    times: list[datetime] = table["timestamp"].to_pylist()
    # A recalled original has its summary already.
    fresh = np.array([value is None for value in table["consolidated_at"].to_pylist()], bool)
    hot = counts >= recipe.hot_accesses
    # A moment that far in the future was written by a wrong clock, and would never grow old.
    cold = ~hot & np.array([abs(now - moment) >= cold_age for moment in times], bool)

    members = np.flatnonzero(hot & free & fresh)
    groups = _groups(table.take(pa.array(members)), store.dim, recipe)
    oldest = sorted(np.flatnonzero(cold & free).tolist(), key=lambda row: (times[row], ids[row]))
    archive = [ids[row] for row in oldest]
    condensed = sum(len(group.ids) for group in groups)
    if recipe.at_hand is not None:
        surplus = int(alive.sum()) - len(archive) - condensed - recipe.at_hand
        others = {ids[row] for row in np.flatnonzero(~hot & ~cold & free)}
        archive += _worth_least(store, others)[: max(0, surplus)]
    return ConsolidationPlan(
        scanned=int(alive.sum()),
        hot=int((hot & alive).sum()),
        cold=int((cold & alive).sum()),
        groups=tuple(groups),
        archive=tuple(archive),
        alone=len(members) - condensed,
        postponed=int((alive & ~free).sum()),
    )


def _worth_least(store: MemoryStore, among: set[str]) -> list[str]:
    """Return short-term memories, those worth least first."""
    ranked = HotColdTiering(store).rank(where=Filter(tiers=(SHORT_TERM,)))
    return [found.memory_id for found in reversed(ranked) if found.memory_id in among]


def _groups(table: pa.Table, dim: int, recipe: ConsolidationRecipe) -> list[Group]:
    """Return which of these rows are to be summarised together."""
    vectors = vectors_array(table["joint_embedding"], dim)
    # A summary lives as long as its sources: those that expire at different times do not mix.
    kinds: dict[tuple[str, datetime | None], list[int]] = {}
    columns = (table[name].to_pylist() for name in ("category", "expires_at"))
    for place, kind in enumerate(zip(*columns, strict=True)):
        kinds.setdefault(kind, []).append(place)
    ids = table["memory_id"].to_pylist()
    groups = []
    for (category, expiry), places in kinds.items():
        for part in stars(vectors[places], recipe.similarity, recipe.batch_size):
            chosen = tuple(sorted(ids[places[at]] for at in part))
            groups.append(Group(chosen, category, expiry))
    return sorted(groups, key=lambda group: group.ids)


def _postponed(store: MemoryStore, now: datetime) -> set[str]:
    """Return the memories of failed batches whose time to retry has not come."""
    latest: dict[str, datetime | None] = {}
    for event in store.events(FAILED):
        latest.update(dict.fromkeys(event.memory_ids, event.retry_at))
    # Nobody is asked to wait longer than this: what is later was written by a wrong clock.
    last = now + timedelta(seconds=LONGEST_BACKOFF)
    return {key for key, moment in latest.items() if moment and now < moment <= last}


def stars(vectors: NDArray[np.float32], similarity: float, most: int) -> Iterator[list[int]]:
    """Cut vectors into groups of two and more, each around a centre all others are near to.

    Star clustering (Aslam, Pelekhov & Rus 2004) on the graph of nearest neighbours, which is found
    without comparing all pairs; unlike chains of neighbours, a star cannot drift.

    >>> vectors = np.array([[1, 0], [0.99, 0.14], [0, 1]], np.float32)
    >>> list(stars(vectors, 0.9, 8))
    [[0, 1]]
    """
    pairs = close_in_meaning(vectors, similarity, most)
    near: dict[int, set[int]] = {}
    for left, right in zip(pairs.left.tolist(), pairs.right.tolist(), strict=True):
        near.setdefault(left, set()).add(right)
        near.setdefault(right, set()).add(left)
    taken: set[int] = set()
    for centre in sorted(near, key=lambda at: (-len(near[at]), at)):
        if centre in taken:
            continue
        others = sorted(near[centre] - taken, key=lambda at: (-vectors[at] @ vectors[centre], at))
        if not others:
            continue
        group = [centre, *others[: most - 1]]
        taken.update(group)
        yield sorted(group)
