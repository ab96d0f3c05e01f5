"""What is to be consolidated: which memories are hot or cold, and which belong together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from memopt.memory.graph.neighbours import close_in_meaning
from memopt.memory.model.filters import utc
from memopt.memory.model.rows import vectors_array
from memopt.memory.model.schema import SHORT_TERM, Filter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.memory.memory_store import MemoryStore

_COLUMNS = (
    "memory_id",
    "joint_embedding",
    "timestamp",
    "access_count",
    "category",
    "expires_at",
    "consolidated_at",
)


@dataclass(frozen=True, slots=True)
class Group:
    """Memories of one category and one expiry that say nearly the same."""

    ids: tuple[str, ...]
    category: str
    expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a consolidation would do.

    Attributes:
        scanned: short-term memories.
        hot, cold: how many of each; hot ones are never cold.
        groups: to be summarised, each in one commit.
        archive: cold ids, oldest first.
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


def make_plan(
    store: MemoryStore,
    *,
    hot_accesses: int,
    cold_age: timedelta,
    similarity: float,
    group_size: int,
    postponed: frozenset[str] = frozenset(),
) -> Plan:
    """Scan the short-term memories and say what is to be done.

    Args:
        hot_accesses: memories read this often are hot.
        cold_age: memories that old, and not hot, are cold.
        similarity: least cosine similarity to the centre of a group.
        group_size: members of a group at most.
        postponed: left alone this time.
    """
    now = utc(store.clock())
    batches = list(store.scan(Filter(tiers=(SHORT_TERM,)), _COLUMNS))
    if not batches:
        return Plan()
    table = pa.Table.from_batches(batches)
    ids: list[str] = table["memory_id"].to_pylist()
    expiries: list[datetime | None] = table["expires_at"].to_pylist()
    alive = np.array([expiry is None or expiry > now for expiry in expiries], bool)
    free = alive & np.array([memory_id not in postponed for memory_id in ids], bool)
    counts = table["access_count"].to_numpy()
    times: list[datetime] = table["timestamp"].to_pylist()
    # A recalled original has its summary already.
    fresh = np.array([value is None for value in table["consolidated_at"].to_pylist()], bool)
    hot = counts >= hot_accesses
    # A moment that far in the future was written by a wrong clock, and would never grow old.
    cold = ~hot & np.array([abs(now - moment) >= cold_age for moment in times], bool)

    members = np.flatnonzero(hot & free & fresh)
    vectors = vectors_array(table["joint_embedding"].take(pa.array(members)), store.dim)
    categories: list[str] = table["category"].to_pylist()
    # A summary lives as long as its sources: those that expire at different times do not mix.
    kinds: dict[tuple[str, datetime | None], list[int]] = {}
    for place, row in enumerate(members.tolist()):
        kinds.setdefault((categories[row], expiries[row]), []).append(place)
    groups = []
    for (category, expiry), places in kinds.items():
        for part in stars(vectors[places], similarity, group_size):
            chosen = tuple(sorted(ids[members[places[at]]] for at in part))
            groups.append(Group(chosen, category, expiry))
    groups.sort(key=lambda group: group.ids)
    oldest = sorted(np.flatnonzero(cold & free).tolist(), key=lambda row: (times[row], ids[row]))
    return Plan(
        scanned=int(alive.sum()),
        hot=int((hot & alive).sum()),
        cold=int((cold & alive).sum()),
        groups=tuple(groups),
        archive=tuple(ids[row] for row in oldest),
        alone=len(members) - sum(len(group.ids) for group in groups),
        postponed=int((alive & ~free).sum()),
    )


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


def chunks(ids: Sequence[str], size: int) -> Iterator[list[str]]:
    """Cut ids into parts of at most ``size``.

    >>> list(chunks("abc", 2))
    [['a', 'b'], ['c']]
    """
    for start in range(0, len(ids), size):
        yield list(ids[start : start + size])
