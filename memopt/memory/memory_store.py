"""The memory store: a LanceDB database that several processes write and read at once.

Here is what a store can do; how is in writing, reading, searching, touches, events and stats.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from memopt.memory.io import parquet as interchange
from memopt.memory.model import content as incoming
from memopt.memory.model import payload
from memopt.memory.model.filters import EVERYTHING, id_list, utc
from memopt.memory.model.schema import (
    AddResult,
    Content,
    Embedder,
    Filter,
    Hit,
    Link,
    Listener,
    Memory,
    NewMemory,
)
from memopt.memory.search import searcher as searching
from memopt.memory.search.surroundings import Looks
from memopt.memory.search.vector_index import VectorIndex
from memopt.memory.store import events
from memopt.memory.store import reader as reading
from memopt.memory.store import reembed as reembedding
from memopt.memory.store import word_column as lexicon
from memopt.memory.store import writer as writing
from memopt.memory.store.access_counts import Touches
from memopt.memory.store.codec import Sealed
from memopt.memory.store.link_cache import Adjacency
from memopt.memory.store.locking import ReadOnlyError
from memopt.memory.store.meta import TABLES
from memopt.memory.store.stats import Stats, stats
from memopt.memory.store.upkeep import Upkeep, merge

if TYPE_CHECKING:
    from numpy.typing import NDArray
_LOG = logging.getLogger(__name__)


class MemoryStore(Sealed):
    """A durable store of memories with their vectors.

    Args:
        path: a local folder (made when absent) or the URI of an object store.
        embedder: makes the vectors of content that comes without one.
        dim: length of a vector; by default the embedder's, or 768. An existing store keeps its own.
        cipher: encrypts text, media and summaries; an encrypted store opens only with its key.
        redact: text -> text, before it is stored, hashed or embedded.
        actor: who reads and writes, for the access log.
        clock: the current time, UTC.
        create: make the store when it is absent; False raises instead.
        background: build the vector index and merge small files in a thread when additions call
            for it; else only ``index.ensure()`` and :meth:`optimize` do.

    Attributes:
        listeners: called on every add and delete.
        adjacency: the links of the association graph, which go with the memories they link.
        observers: called with (action, ids) on every 'read', 'write' and 'delete'.
        closing: called by :meth:`close`, to write what is buffered.
        index: the vector index; it keeps itself fresh.

    Raises:
        ConsolidationError: the path is no store, the store is of a newer format, or the key is
            wrong.
        InputError: ``dim`` is not the dimension of the store.

    >>> import tempfile
    >>> with MemoryStore(tempfile.mkdtemp(), dim=2) as store:
    ...     new = NewMemory(content=Content(text="a red door"), embedding=np.array([1.0, 0.0]))
    ...     result = store.add(new)
    ...     store.search(np.array([1.0, 0.1]))[0].memory.text
    'a red door'
    """

    def __init__(
        self,
        path: str | Path,
        *,
        embedder: Embedder | None = None,
        dim: int | None = None,
        cipher: payload.Cipher | None = None,
        redact: Callable[[str], str] | None = None,
        actor: str | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        create: bool = True,
        background: bool = True,
    ) -> None:
        super().__init__(path, dim, embedder, cipher, clock, create=create)
        self.redact = redact
        self.actor = actor or os.environ.get("USER", "")
        self.listeners: list[Listener] = []
        self.observers: list[Callable[[str, Sequence[str]], None]] = []
        self.closing: list[Callable[[], None]] = []
        self.index = VectorIndex(self, background=background)
        self.upkeep = Upkeep(self, background=background)
        self.adjacency = Adjacency(self)
        self._touches = Touches(self)
        self._told_read_only = False
        self.wanted_columns: set[str] = set()
        self.word_columns = lexicon.opened(self)
        self.looks = Looks(self)

    # --- life -------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is buffered and wait for the index. The store can still be used afterwards.

        In a process that was forked meanwhile nothing is done: what is buffered is the other's.
        """
        if self.forked:
            return
        for write in self.closing:
            self.keep_book(write)
        self.keep_book(self.flush)
        self.adjacency.close()
        self.index.close()
        self.upkeep.close()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Do what :meth:`Sealed.changing` does, and look after the files it leaves."""
        with super().changing():
            yield
        self.upkeep.wrote()

    def keep_book(self, write: Callable[[], None]) -> None:
        """Write down what reading leaves behind, where the store can be written.

        Whoever may only read finds what is there; that is said in the log once. What a forked
        process finds buffered is written by the other.
        """
        if self.forked:
            return
        try:
            write()
        except ReadOnlyError as error:
            if not self._told_read_only:
                self._told_read_only = True
                _LOG.warning(
                    "%s may only be read: accesses are neither counted nor logged (%s)",
                    self.place,
                    error,
                )

    # --- writing ----------------------------------------------------------------------------

    def add(self, memories: NewMemory | Iterable[NewMemory]) -> AddResult:
        """Store memories; one that is there already is left as it is, but for a later end.

        There is what has the same content and category now; under an id chosen by the caller,
        whatever has that id (see :attr:`AddResult.differing`). What has expired is not there.

        A sequence is checked whole before anything is stored; an iterator is stored in chunks of
        ``writing.ROWS_PER_COMMIT``, each one atomic commit, so that after an error or a crash the
        same call can be repeated and completes what is missing.

        Raises:
            InputError: a memory is empty, too large, damaged, or its vector does not fit; no
                memory of its chunk was stored.
        """
        return writing.add(self, memories)

    def add_arrow(self, batches: pa.Table | Iterable[pa.RecordBatch]) -> AddResult:
        """Store a stream of Arrow batches, in chunks; see :meth:`add`.

        Args:
            batches: any of the columns memory_id, text, vision_data, audio_data, timestamp,
                category, expires_at, and joint_embedding (list of float16/32/64, dim long).

        Raises:
            InputError: an unknown column, a type that does not fit, or a bad row.
        """
        stream = batches.to_batches() if isinstance(batches, pa.Table) else batches
        return writing.add(self, writing.arrow_memories(self, stream))

    def commit(
        self,
        inserts: pa.Table | None = None,
        updates: pa.Table | None = None,
        deletes: Sequence[str] = (),
    ) -> None:
        """Change ``memories`` in one atomic commit: all of it happens or none.

        Args:
            inserts: whole rows with new ids (see :func:`memopt.memory.model.rows.new_rows`).
            updates: whole rows with ids that exist; access counts never go back.
            deletes: ids that exist.

        Raises:
            ConsolidationError: an id to update or delete is gone, or one to insert is there: what
                the change was computed from is no longer true. Nothing was changed.
        """
        writing.commit(self, inserts, updates, deletes)

    def update(self, memory_id: str, **fields: Any) -> None:
        """Change fields of one memory; a summary of what it said before goes.

        Args:
            fields: any of text, vision_data, audio_data, category, timestamp, expires_at,
                joint_embedding, and summary of a memory that is not short-term. New content is
                embedded again, unless ``joint_embedding`` comes with it.

        Raises:
            InputError: an unknown id or field, or a value :meth:`add` would refuse.
        """
        writing.update(self, memory_id, fields)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete memories with their links in one commit; unknown ids are passed over.

        Summaries made of them go too, and what else these were made of is short-term again. The
        bytes leave the disk when old versions are dropped.

        Returns:
            How many went, summaries among them.
        """
        return writing.delete(self, ids)

    def optimize(self) -> None:
        """Merge all files and bring every index up to date; readers go on meanwhile.

        Older versions that nobody reads leave the disk.

        Raises:
            ConsolidationError: the disk takes no more; the store is as it was.
        """
        lexicon.upgrade(self)
        self.word_columns = lexicon.indexed(self.memories)
        for name in TABLES:
            merge(self, name)

    def touch(self, ids: Sequence[str]) -> None:
        """Count one access of each; written in the background, at the latest by close()."""
        self.check_process()
        self._touches.count(id_list(ids), utc(self.clock()))

    def flush(self) -> None:
        """Write the buffered access counts now."""
        self._touches.flush()

    def pending_touches(self) -> dict[str, tuple[int, datetime]]:
        """Return id -> (accesses, last access) that are not in the table yet."""
        return self._touches.pending()

    # --- reading ----------------------------------------------------------------------------

    def get(self, memory_id: str, *, links: bool = True) -> Memory:
        """Return one memory; looking at it by id does not raise its access count.

        Raises:
            InputError: there is none of that id.
        """
        return self.get_many([memory_id], links=links)[0]

    def get_many(self, ids: Sequence[str], *, links: bool = True) -> list[Memory]:
        """Return memories in the order of ``ids``, with their links unless told not to.

        Raises:
            InputError: one is unknown (or expired), naming it.
        """
        return reading.get_many(self, ids, links=links)

    def rows(self, ids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Return the raw rows (packed content stays packed) of those ``ids`` that exist.

        Any order; all columns by default. Only the rows asked for are read from disk.
        """
        return reading.raw_rows(self, ids, columns)

    def rows_at(self, row_ids: Mapping[str, int], columns: Sequence[str]) -> pa.Table | None:
        """Return raw columns of rows (id -> row id) just seen; None where they moved since."""
        return reading.by_row_id(self, row_ids, columns)

    def light(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Return small columns of those ``ids`` that exist, in any order, by one filtered scan."""
        return reading.light(self, ids, columns)

    def links(self, ids: Sequence[str]) -> dict[str, list[Link]]:
        """Return the associations of each memory that has any, strongest first."""
        return reading.links_of(self, ids)

    def scan(
        self,
        where: Filter = EVERYTHING,
        columns: Sequence[str] | None = None,
        batch_size: int = 4096,
    ) -> Iterator[pa.RecordBatch]:
        """Yield raw rows (packed content stays packed) in batches, from one consistent version.

        Args:
            where: expired rows count too.
            columns: by default all; name few, media are large.
        """
        return reading.scan(self, where, columns, batch_size)

    def vectors(
        self, ids: Sequence[str] | None = None, where: Filter = EVERYTHING
    ) -> tuple[list[str], NDArray[np.float32]]:
        """Return ids and vectors, float32 (n, dim), of given ids (in their order) or of a filter.

        Raises:
            InputError: one of ``ids`` is unknown.
        """
        return reading.vectors(self, ids, where)

    def count(self, where: Filter = EVERYTHING) -> int:
        """Return how many memories pass the filter."""
        return reading.count(self, where)

    def search(
        self,
        vector: NDArray[Any] | Sequence[float] | None = None,
        *,
        text: str | None = None,
        where: Filter = EVERYTHING,
        top_k: int = 10,
        touch: bool = True,
        model_id: str | None = None,
    ) -> list[Hit]:
        """Find memories by vector, by words, or by both (:mod:`memopt.memory.search.relevance`).

        Args:
            vector: (dim,), of the model the store was made with.
            text: words; full-text search of the plain texts and summaries (BM25). In an encrypted
                store, which has no word index, a vector beside it decides alone.
            where: only these.
            touch: count the results as accessed.
            model_id: what made ``vector``; refused when it is not what made the store's vectors.

        Returns:
            At most ``top_k`` hits, best first, without links. The score is the cosine similarity
            for a vector, BM25 relative to the best hit for words, the relevance for
            both; 0..1.

        Raises:
            InputError: no query at all, a vector that does not fit, top_k below 1.
            ConsolidationError: search by words alone in an encrypted store.
        """
        self.check_model(model_id)
        found = searching.search(self, vector, text=text, where=where, top_k=top_k)
        ids = [hit.memory.memory_id for hit in found]
        if touch:
            self.touch(ids)
        self.observe("read", ids)
        return found

    def candidates(
        self,
        vector: NDArray[Any] | Sequence[float],
        *,
        where: Filter = EVERYTHING,
        top_k: int = 10,
    ) -> list[tuple[str, float]]:
        """Return (id, cosine similarity), best first, without reading the memories.

        The first step of a longer retrieval: not counted as accesses, not observed.

        Raises:
            InputError: as :meth:`search`.
        """
        return searching.candidates(self, [vector], where=where, top_k=top_k)[0]

    def find(
        self,
        content: Content,
        *,
        where: Filter = EVERYTHING,
        top_k: int = 10,
        touch: bool = True,
    ) -> list[Hit]:
        """Embed ``content`` and search by its vector.

        Raises:
            InputError: the content is empty or damaged, or the embedder is not the store's.
        """
        incoming.check_content(content, "query")
        searching.check_top_k(top_k)
        return self.search(self.embed([content])[0], where=where, top_k=top_k, touch=touch)

    def stats(self) -> Stats:
        """Count what is there, by tier, modality and category, and measure the folder."""
        return stats(self)

    # --- the whole store --------------------------------------------------------------------

    def export_parquet(self, folder: str | Path) -> interchange.Transfer:
        """Write the three files other tools read; see :mod:`memopt.memory.io.parquet`."""
        return interchange.export_parquet(self, folder)

    def import_parquet(self, folder: str | Path) -> interchange.Transfer:
        """Add what :meth:`export_parquet` wrote; ids that are there are left alone.

        Raises:
            InputError: a file is missing, damaged, or of another schema, dimension or model.
        """
        return interchange.import_parquet(self, folder)

    def reembed(self, embedder: Embedder) -> int:
        """Move the store to another model; see :func:`memopt.memory.store.reembed.reembed`.

        Raises:
            InputError: the new model cannot embed a memory; the store stays as it is.
        """
        moved = reembedding.reembed(self, embedder)
        self.embedder = embedder
        return moved

    # --- events and what others build on ----------------------------------------------------

    def event(
        self,
        kind: str,
        detail: str,
        ids: Sequence[str] = (),
        retry_at: datetime | None = None,
    ) -> None:
        """Record that something failed, was put off or went another way."""
        events.record(self, kind, detail, ids, retry_at)

    def events(self, kind: str | None = None) -> list[events.Event]:
        """Return events, oldest first."""
        return events.read(self, kind)

    def observe(self, action: str, ids: Sequence[str]) -> None:
        """Tell the observers who was read, written or deleted."""
        if ids:
            for observer in self.observers:
                observer(action, ids)
