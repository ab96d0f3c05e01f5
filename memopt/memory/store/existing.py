"""What is there already of memories to be added: as they are now, not as they were once added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from memopt.memory.lifecycle.retention import expiry
from memopt.memory.model import content as incoming
from memopt.memory.model.filters import utc
from memopt.memory.model.schema import Content, NewMemory

if TYPE_CHECKING:
    from memopt.memory.memory_store import MemoryStore

_CONTENT = {"text": "text", "vision_data": "vision", "audio_data": "audio"}


@dataclass(slots=True)
class Standing:
    """How memories to be added stand to those of a store.

    Attributes:
        ids: of each memory given, in order.
        new: id -> position of what is to be stored.
        ends: id -> when a new memory expires, None for never.
        renewed: id -> the later end of one that is there.
        expired: ids of ``new`` whose place an expired memory still takes.
        differing: chosen ids under which other content is kept.
    """

    ids: list[str]
    new: dict[str, int] = field(default_factory=dict)
    ends: dict[str, datetime | None] = field(default_factory=dict)
    renewed: dict[str, datetime | None] = field(default_factory=dict)
    expired: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)


def standing(store: MemoryStore, memories: Sequence[NewMemory], now: datetime) -> Standing:
    """Compare checked memories with what the store holds under their ids at this moment.

    A memory without a chosen id is there when its content is, in whatever Unicode normalisation:
    where another took the id of that content (it was changed by an update), the next id of the
    content is looked at.
    """
    found = Standing([""] * len(memories))
    # Once: each looks at a file.
    retention, secret = store.meta.retention, store.id_key().value
    ends = [end_of(memory, now, retention) for memory in memories]
    rest, turn = list(range(len(memories))), 0
    while rest:
        keys = {
            at: [chosen]
            if (chosen := memories[at].memory_id)
            else incoming.content_ids(memories[at].content, memories[at].category, secret, turn)
            for at in rest
        }
        there = rows_there(store, list(dict.fromkeys(key for own in keys.values() for key in own)))
        again = []
        for at, own in keys.items():
            memory = memories[at]
            taken = [key for key in own if key in there and not has_expired(there[key], now)]
            same = [key for key in taken if _same(there[key], memory)]
            key = next(iter([*same, *taken, *own]))
            row = there.get(key)
            if taken:
                if same and row is not None:
                    known = found.renewed.get(key, row["expires_at"])
                    if later(known, ends[at]) != known:
                        found.renewed[key] = later(known, ends[at])
                elif memory.memory_id is None:
                    again.append(at)
                    continue
                else:
                    found.differing.append(key)
            elif key not in found.new:
                found.new[key], found.ends[key] = at, ends[at]
                if row is not None:
                    found.expired.append(key)
            elif _composed(memories[found.new[key]].content) == _composed(memory.content):
                found.ends[key] = later(found.ends[key], ends[at])
            else:
                found.differing.append(key)
            found.ids[at] = key
        rest, turn = again, turn + 1
    return found


def end_of(memory: NewMemory, now: datetime, retention: Any) -> datetime | None:
    """Return when a memory expires: by its own time or by the policy of its category, if sooner."""
    at = utc(memory.timestamp) if memory.timestamp else now
    own = utc(memory.expires_at) if memory.expires_at else None
    return min(filter(None, (own, expiry(memory.category, at, retention))), default=None)


def later(one: datetime | None, other: datetime | None) -> datetime | None:
    """Return the later of two ends; None is never.

    >>> later(datetime(2026, 1, 1), None) is None
    True
    """
    return None if one is None or other is None else max(one, other)


def rows_there(store: MemoryStore, ids: list[str]) -> dict[str, dict[str, Any]]:
    """Return id -> end, category and content of those that are there, expired ones too."""
    names = ("memory_id", "expires_at", "category")
    rows = {row["memory_id"]: row for row in store.light(ids, names).to_pylist()}
    if not rows:
        return rows
    wanted = ["memory_id", *_CONTENT, "summary", "codec", "packed"]
    for row in store.unpack(store.rows(list(rows), wanted)).to_pylist():
        rows[row["memory_id"]].update(row)
    return rows


def has_expired(row: dict[str, Any], now: datetime) -> bool:
    """Say whether a row's end has come."""
    return row["expires_at"] is not None and row["expires_at"] <= now


def _same(row: dict[str, Any], memory: NewMemory) -> bool:
    content = Content(**{short: row.get(name) for name, short in _CONTENT.items()})
    # A chosen id names the content whatever its category; else the category is part of the id.
    same_place = memory.memory_id is not None or row["category"] == memory.category
    return _composed(content) == _composed(memory.content) and same_place


def _composed(content: Content) -> Content:
    return incoming.spellings(content)[0]
