"""Adding what an export or another tool wrote: all of it checked first, then in one commit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from memopt.errors import InputError
from memopt.memory.io.export import Transfer
from memopt.memory.io.files import find, model_of, read_links, read_memories, read_summaries
from memopt.memory.io.staging import Parts, Staging
from memopt.memory.model.content import composed
from memopt.memory.model.payload import CONTENT
from memopt.memory.model.schema import EDGES, LONG_TERM
from memopt.memory.store.comparison import has_expired
from memopt.memory.store.ends import later, set_ends
from memopt.memory.store.writer import Writer


class Import:
    """Adds files to a store, as :meth:`MemoryStore.add` would.

    Everything is read, checked and redacted before anything is stored, then stored in one commit;
    the links follow. An id that is there keeps its content, but for a later end. A memory expires
    at its own time, or by the retention of this store when that is sooner. Summaries whose ids are
    not among the memories get the middle of their sources for a vector; sources that the files
    give no tier are archived, as consolidation does.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer, self._reader = writer, writer.reader
        self._database, self._cells = writer.reader.database, writer.reader.cells

    def run(self, folder: str | Path) -> Transfer:
        """Add what a folder of files, as in :mod:`memopt.memory.io.files`, or one of them holds.

        Raises:
            InputError: there are none, one is damaged, of another kind, dimension or model, or a
                row is one that add would refuse. Nothing was added.
        """
        files = find(Path(folder))
        model, own = model_of(files), self._database.meta.model_id
        if model and own and model != own:
            raise InputError(
                f"{folder} holds vectors of {model!r}, the store of {own!r}",
                fix="import into a new store, or reembed",
            )
        links = sum(len(part) for part in read_links(files))  # checked before anything is stored
        staging = Staging(self._writer, files, model)
        with staging.rows() as parts:
            found = self._commit(parts, model)
        linked: set[str] = set()
        dangling: set[tuple[str, str]] = set()
        for part in read_links(files) if links else ():
            self._add_links(part, linked, dangling)
        return Transfer(
            found.added,
            len(linked),
            found.summaries,
            found.already,
            found.differing,
            staging.expired,
            len(dangling),
        )

    def _commit(self, parts: Parts, model: str) -> _Outcome:
        """Store what of the staged rows is not there, in one commit."""
        database = self._database
        found = _Outcome()

        def rest() -> Iterator[pa.Table]:
            for part, new in zip(parts, found.new, strict=True):
                yield part.filter(new)

        with database.changing():
            self._writer.sweep()
            if model and not database.meta.model_id and not database.memories.count_rows():
                database.write_meta(model_id=model)
            for part in parts:
                self._compare(part, found)
            set_ends(database, found.ends)
            if found.expired:
                self._writer.clear(found.expired)
            ids = [key for part in rest() for key in part["memory_id"].to_pylist()]
            if ids:
                self._writer.insert(self._cells.with_words(part) for part in rest())
        database.observers.accessed("delete", found.expired)
        database.observers.accessed("write", [*ids, *found.ends])
        for part in rest():
            self._writer.announce(part)
            found.summaries += part["tier"].to_pylist().count(LONG_TERM)
        found.added = len(ids)
        return found

    def _compare(self, part: pa.Table, found: _Outcome) -> None:
        """Say which staged rows are new, and what of the others is to be done."""
        now, ids = self._database.now(), part["memory_id"].to_pylist()
        there = self._writer.existing.rows(ids)
        living = {key: row for key, row in there.items() if not has_expired(row, now)}
        found.expired += sorted(set(there) - set(living))
        new = pa.array([key not in living for key in ids], pa.bool_())
        found.new.append(new)
        found.already += len(living)
        known = part.filter(pc.invert(new))
        for row in self._cells.unpack(known).to_pylist() if living else ():
            old = living[row["memory_id"]]
            same = all(_composed(old[name]) == _composed(row[name]) for name in CONTENT)
            found.differing += not same
            if same and later(old["expires_at"], row["expires_at"]) != old["expires_at"]:
                found.ends[row["memory_id"]] = row["expires_at"]

    def _add_links(
        self, links: list[tuple[str, str, float]], linked: set[str], dangling: set[tuple[str, str]]
    ) -> None:
        """Add links in both directions where both ends are there; those there already stay."""
        weights: dict[tuple[str, str], float] = {}
        for left, right, weight in links:
            for pair in ((left, right), (right, left)) if left != right else ():
                weights[pair] = max(weight, weights.get(pair, 0.0))
        if not weights:
            return
        ends = list({end for pair in weights for end in pair})
        with self._database.changing():
            there = self._database.existing(ends)
            dangling |= {pair for pair in weights if pair[0] < pair[1] and not set(pair) <= there}
            known = {
                (source, link.linked_id)
                for source, own in self._reader.links(ends).items()
                for link in own
            }
            now = self._database.now()
            edges = [
                {"source": a, "target": b, "weight": w, "kind": "imported", "updated_at": now}
                for (a, b), w in weights.items()
                if (a, b) not in known and {a, b} <= there
            ]
            if edges:
                self._database.table("edges").add(pa.Table.from_pylist(edges, EDGES))
        linked |= {str(edge["source"]) for edge in edges}


@dataclass(slots=True)
class _Outcome:
    """What became of staged rows.

    Attributes:
        new: for each part, which of its rows are new, bool.
        expired: ids whose place an expired memory still takes.
        ends: id -> the later end of one that is there.
    """

    added: int = 0
    already: int = 0
    differing: int = 0
    summaries: int = 0
    new: list[pa.Array] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    ends: dict[str, datetime | None] = field(default_factory=dict)


def check_export(folder: str | Path) -> int | None:
    """Look at every memory, summary and link of an export before anything is made of it.

    Returns:
        The dimension of its vectors; None when it has none.

    Raises:
        InputError: as :meth:`Import.run`, as far as no store is needed to tell.
    """
    files = find(Path(folder))
    model_of(files)
    dim: int | None = None
    for row in read_memories(files):
        dim = len(row.vector)
    read_summaries(files)
    for _ in read_links(files):
        pass
    return dim


def _composed(value: Any) -> Any:
    return composed(value) if isinstance(value, str) else value
