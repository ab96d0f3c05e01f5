"""Events: what went wrong or another way, and when to try again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import pyarrow as pa

from memopt.memory.model.filters import one_of, utc
from memopt.memory.model.schema import EVENTS

if TYPE_CHECKING:
    from memopt.memory.memory_store import MemoryStore


@dataclass(frozen=True, slots=True)
class Event:
    """One row of the ``events`` table."""

    at: datetime
    kind: str
    detail: str
    memory_ids: tuple[str, ...] = ()
    retry_at: datetime | None = None


def record(
    store: MemoryStore, kind: str, detail: str, ids: Sequence[str], retry_at: datetime | None
) -> None:
    """Do what :meth:`MemoryStore.event` says."""
    row = {
        "at": utc(store.clock()),
        "kind": kind,
        "detail": detail,
        "memory_ids": list(ids),
        "retry_at": utc(retry_at) if retry_at else None,
    }
    with store.changing():
        store.table("events").add(pa.Table.from_pylist([row], schema=EVENTS))


def read(store: MemoryStore, kind: str | None) -> list[Event]:
    """Do what :meth:`MemoryStore.events` says."""
    query = store.query("events")
    if kind is not None:
        query = query.where(one_of("kind", [kind]))
    # In the order they were written, not by their times: a clock that was wrong once would else put
    # one event after all later ones.
    return [
        Event(**{**row, "memory_ids": tuple(row["memory_ids"])})
        for row in store.fetch(query).to_pylist()
    ]


def scrub(store: MemoryStore) -> None:
    """Blank the details of events about memories that are gone: they may quote them."""
    with store.changing():
        table = store.table("events")
        found = table.search().limit(None).to_arrow()
        named = sorted({key for ids in found["memory_ids"].to_pylist() for key in ids})
        there = set(store.light(named, ["memory_id"])["memory_id"].to_pylist())
        rows = found.to_pylist()
        quoting = [row for row in rows if row["detail"] and set(row["memory_ids"]) - there]
        if quoting:
            for row in quoting:
                row["detail"] = ""
            table.add(pa.Table.from_pylist(rows, schema=EVENTS), mode="overwrite")
