"""Memories to be added against those that are there: as they are now, not as they were added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from memopt.memory.model.content import content_ids, spellings
from memopt.memory.model.schema import CONTENT_COLUMNS, Content, NewMemory
from memopt.memory.store.ends import end_of, later
from memopt.memory.store.reader import Reader


@dataclass(slots=True)
class Comparison:
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


class Existing:
    """What a store holds under ids that memories to be added may have."""

    def __init__(self, reader: Reader) -> None:
        self._database, self._reader = reader.database, reader

    def rows(self, ids: list[str]) -> dict[str, dict[str, Any]]:
        """Return id -> end, category and content of those that are there, expired ones too."""
        names = ("memory_id", "expires_at", "category")
        rows = {row["memory_id"]: row for row in self._database.light(ids, names).to_pylist()}
        if not rows:
            return rows
        columns = ["memory_id", *CONTENT_COLUMNS, "summary", "codec", "packed"]
        for row in self._reader.cells.unpack(self._reader.rows(list(rows), columns)).to_pylist():
            rows[row["memory_id"]].update(row)
        return rows

    def compare(self, memories: Sequence[NewMemory], now: datetime) -> Comparison:
        """Compare checked memories with what the store holds under their ids at this moment.

        A memory without a chosen id is there when its content is, in whatever Unicode
        normalisation: where another took the id of that content (it was changed by an update), the
        next id of the content is looked at.
        """
        found = Comparison([""] * len(memories))
        # Once: each looks at a file.
        retention, secret = self._database.meta.retention, self._database.id_key().value
        ends = [end_of(memory, now, retention) for memory in memories]
        rest, turn = list(range(len(memories))), 0
        while rest:
            keys = {at: _ids_of(memories[at], secret, turn) for at in rest}
            there = self.rows(list(dict.fromkeys(key for own in keys.values() for key in own)))
            again = []
            for at, own in keys.items():
                memory = memories[at]
                taken = [key for key in own if key in there and not has_expired(there[key], now)]
                same = [key for key in taken if _same(there[key], memory)]
                key = next(iter([*same, *taken, *own]))
                if same:
                    known = found.renewed.get(key, there[key]["expires_at"])
                    if later(known, ends[at]) != known:
                        found.renewed[key] = later(known, ends[at])
                elif taken and memory.memory_id is None:
                    again.append(at)
                    continue
                elif taken:
                    found.differing.append(key)
                elif key not in found.new:
                    found.new[key], found.ends[key] = at, ends[at]
                    if key in there:
                        found.expired.append(key)
                elif _composed(memories[found.new[key]].content) == _composed(memory.content):
                    found.ends[key] = later(found.ends[key], ends[at])
                else:
                    found.differing.append(key)
                found.ids[at] = key
            rest, turn = again, turn + 1
        return found


def has_expired(row: dict[str, Any], now: datetime) -> bool:
    """Say whether a row's end has come."""
    return row["expires_at"] is not None and row["expires_at"] <= now


def _ids_of(memory: NewMemory, secret: bytes, turn: int) -> list[str]:
    if memory.memory_id:
        return [memory.memory_id]
    return content_ids(memory.content, memory.category, secret, turn)


def _same(row: dict[str, Any], memory: NewMemory) -> bool:
    content = Content(**{short: row.get(name) for name, short in CONTENT_COLUMNS.items()})
    # A chosen id names the content whatever its category; else the category is part of the id.
    same_place = memory.memory_id is not None or row["category"] == memory.category
    return _composed(content) == _composed(memory.content) and same_place


def _composed(content: Content) -> Content:
    return spellings(content)[0]
