"""Events: what went wrong or another way, and when to try again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa

from memopt.memory.model.filters import one_of, utc
from memopt.memory.model.schema import EVENTS
from memopt.memory.store.database import Database


@dataclass(frozen=True, slots=True)
class Event:
    """One row of the ``events`` table."""

    at: datetime
    kind: str
    detail: str
    memory_ids: tuple[str, ...] = ()
    retry_at: datetime | None = None


class Events:
    """The ``events`` table of a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(
        self, kind: str, detail: str, ids: Sequence[str] = (), retry_at: datetime | None = None
    ) -> None:
        """Record that something failed, was put off or went another way."""
        row = {
            "at": self._database.now(),
            "kind": kind,
            "detail": detail,
            "memory_ids": list(ids),
            "retry_at": utc(retry_at) if retry_at else None,
        }
        with self._database.changing():
            self._database.table("events").add(pa.Table.from_pylist([row], schema=EVENTS))

    def read(self, kind: str | None = None) -> list[Event]:
        """Return events in the order they were written.

        Not by their times: a clock that was wrong once would else put one event after all later
        ones.
        """
        query = self._database.query("events")
        if kind is not None:
            query = query.where(one_of("kind", [kind]))
        return [
            Event(**{**row, "memory_ids": tuple(row["memory_ids"])})
            for row in self._database.fetch(query).to_pylist()
        ]

    def scrub(self) -> None:
        """Blank the details of events about memories that are gone: they may quote them."""
        with self._database.changing():
            table = self._database.table("events")
            rows = table.search().limit(None).to_arrow().to_pylist()
            named = sorted({key for row in rows for key in row["memory_ids"]})
            there = self._database.existing(named)
            quoting = [row for row in rows if row["detail"] and set(row["memory_ids"]) - there]
            if quoting:
                for row in quoting:
                    row["detail"] = ""
                table.add(pa.Table.from_pylist(rows, schema=EVENTS), mode="overwrite")
