"""The memory store: a LanceDB database that several processes write and read at once.

Here is what a store can do; how is in its parts, each of which is given what it needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from numpy.typing import NDArray

from memopt.memory.io.arrow_rows import arrow_memories
from memopt.memory.io.export import Transfer, export
from memopt.memory.io.imports import Import
from memopt.memory.model.content import check_content
from memopt.memory.model.filters import EVERYTHING
from memopt.memory.model.payload import Cipher
from memopt.memory.model.schema import AddResult, Content, Embedder, Filter, Hit, Memory, NewMemory
from memopt.memory.search.searcher import Searcher, check_top_k
from memopt.memory.search.vector_index import VectorIndex
from memopt.memory.store.access_counts import AccessCounts
from memopt.memory.store.cells import Cells
from memopt.memory.store.database import Database
from memopt.memory.store.embedding import Embedding
from memopt.memory.store.events import Event, Events
from memopt.memory.store.link_cache import LinkCache
from memopt.memory.store.meta import TABLES, Meta
from memopt.memory.store.reader import Reader
from memopt.memory.store.reembed import Move
from memopt.memory.store.stats import Stats, stats
from memopt.memory.store.upkeep import Upkeep
from memopt.memory.store.writer import Writer


class MemoryStore:
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
        place: where the store lies.
        observers: who is told what happens to the memories.
        database: tables, lock and meta.
        index: the vector index; it keeps itself fresh.
        cells, embedding, reader, writer, searcher, counts, link_cache,
            event_log, upkeep: its other parts. Of these are ``rows``, ``scan``, ``vectors``,
            ``links``, ``commit``, ``event``, ``embed`` and ``content_id``.

    Raises:
        ConsolidationError: the path is no store, the store is of a newer format, or the key is
            wrong.
        InputError: ``dim`` is not the dimension of the store.

    >>> import tempfile
    >>> import numpy as np
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
        cipher: Cipher | None = None,
        redact: Callable[[str], str] | None = None,
        actor: str | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        create: bool = True,
        background: bool = True,
    ) -> None:
        self.database = Database(path, dim, embedder, cipher, clock, create=create)
        self.actor = actor or os.environ.get("USER", "")
        self.cells = Cells(self.database)
        self.embedding = Embedding(self.database, embedder)
        self.counts = AccessCounts(self.database)
        self.event_log = Events(self.database)
        self.link_cache = LinkCache(self.database, self.event_log)
        self.reader = Reader(self.cells, self.counts)
        self.writer = Writer(self.reader, self.embedding, redact)
        self.upkeep = Upkeep(
            self.database, self.link_cache, lambda: self.index.fit(), background=background
        )
        self.index = VectorIndex(
            self.reader, self.event_log, self.upkeep.merge, background=background
        )
        self.searcher = Searcher(self.reader, self.embedding, self.index)
        self.place, self.observers = self.database.place, self.database.observers
        # Rows as they are stored, for what builds on a store.
        self.rows, self.scan, self.vectors = self.reader.rows, self.reader.scan, self.reader.vectors
        self.links, self.commit, self.event = (
            self.reader.links,
            self.writer.commit,
            self.event_log.record,
        )
        self.embed, self.content_id = self.embedding.embed, self.cells.content_id
        # Closed from the last to the first: files are looked after when all is written.
        for part in (self.upkeep, self.index, self.link_cache, self.counts):
            self.observers.add(part)

    # --- what it is ----------------------------------------------------------------------

    @property
    def meta(self) -> Meta:
        """Dimension, model and format, as they are now."""
        return self.database.meta

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.database.dim

    @property
    def embedder(self) -> Embedder | None:
        """What makes the vectors of content that comes without one."""
        return self.embedding.embedder

    @property
    def redact(self) -> Callable[[str], str] | None:
        """What texts pass through before they are stored."""
        return self.writer.redact

    # --- life -------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is buffered and wait for the index. The store can still be used afterwards.

        In a process that was forked meanwhile nothing is done: what is buffered is the other's.
        """
        if not self.database.forked:
            self.observers.closing()

    # --- writing ----------------------------------------------------------------------------

    def add(self, memories: NewMemory | Iterable[NewMemory]) -> AddResult:
        """Store memories; one that is there already is left as it is, but for a later end.

        There is what has the same content and category now; under an id chosen by the caller,
        whatever has that id (see :attr:`AddResult.differing`). What has expired is not there.

        A sequence is checked whole before anything is stored; an iterator is stored in chunks of
        8,192, each one atomic commit, so that after an error or a crash the same call can be
        repeated and completes what is missing.

        Raises:
            InputError: a memory is empty, too large, damaged, or its vector does not fit; no
                memory of its chunk was stored.
        """
        return self.writer.add(memories)

    def add_arrow(self, batches: pa.Table | Iterable[pa.RecordBatch]) -> AddResult:
        """Store a stream of Arrow batches, in chunks; see :meth:`add`.

        Args:
            batches: any of the columns memory_id, text, vision_data, audio_data, timestamp,
                category, expires_at, and joint_embedding (list of float16/32/64, dim long).

        Raises:
            InputError: an unknown column, a type that does not fit, or a bad row.
        """
        stream = batches.to_batches() if isinstance(batches, pa.Table) else batches
        return self.writer.add(arrow_memories(stream, self.dim))

    def update(self, memory_id: str, **fields: Any) -> None:
        """Change fields of one memory; a summary of what it said before goes.

        Args:
            fields: any of text, vision_data, audio_data, category, timestamp, expires_at,
                joint_embedding, and summary of a memory that is not short-term. New content is
                embedded again, unless ``joint_embedding`` comes with it.

        Raises:
            InputError: an unknown id or field, or a value :meth:`add` would refuse.
        """
        self.writer.update(memory_id, fields)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete memories with their links in one commit; unknown ids are passed over.

        Summaries made of them go too, and what else these were made of is short-term again. The
        bytes leave the disk when old versions are dropped.

        Returns:
            How many went, summaries among them.
        """
        return self.writer.delete(ids)

    def optimize(self) -> None:
        """Merge all files and bring every index up to date; readers go on meanwhile.

        Older versions that nobody reads leave the disk.

        Raises:
            ConsolidationError: the disk takes no more; the store is as it was.
        """
        self.cells.upgrade()
        for name in TABLES:
            self.upkeep.merge(name)

    def touch(self, ids: Sequence[str]) -> None:
        """Count one access of each; written in the background, at the latest by close()."""
        self.counts.count(ids)

    def flush(self) -> None:
        """Write the buffered access counts now."""
        self.counts.flush()

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
        return self.reader.get_many(ids, links=links)

    def count(self, where: Filter = EVERYTHING) -> int:
        """Return how many memories pass the filter."""
        return self.reader.count(where)

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
        self.embedding.check_model(model_id)
        found = self.searcher.search(vector, text=text, where=where, top_k=top_k)
        ids = [hit.memory.memory_id for hit in found]
        if touch:
            self.touch(ids)
        self.observers.accessed("read", ids)
        return found

    def candidates(
        self, vector: NDArray[Any] | Sequence[float], *, where: Filter = EVERYTHING, top_k: int = 10
    ) -> list[tuple[str, float]]:
        """Return (id, cosine similarity), best first, without reading the memories.

        The first step of a longer retrieval: not counted as accesses, not observed.

        Raises:
            InputError: as :meth:`search`.
        """
        return self.searcher.candidates([vector], where=where, top_k=top_k)[0]

    def find(
        self, content: Content, *, where: Filter = EVERYTHING, top_k: int = 10, touch: bool = True
    ) -> list[Hit]:
        """Embed ``content`` and search by its vector.

        Raises:
            InputError: the content is empty or damaged, or the embedder is not the store's.
        """
        check_content(content, "query")
        check_top_k(top_k)
        vector = self.embedding.embed([content])[0]
        return self.search(vector, where=where, top_k=top_k, touch=touch)

    def stats(self) -> Stats:
        """Count what is there, by tier, modality and category, and measure the folder."""
        return stats(self.reader)

    # --- the whole store --------------------------------------------------------------------

    def export_parquet(self, folder: str | Path) -> Transfer:
        """Write the three files other tools read; see :func:`memopt.memory.io.export.export`."""
        return export(self.reader, folder)

    def import_parquet(self, folder: str | Path) -> Transfer:
        """Add what :meth:`export_parquet` wrote; ids that are there are left alone.

        Raises:
            InputError: a file is missing, damaged, or of another schema, dimension or model.
        """
        return Import(self.writer).run(folder)

    def reembed(
        self, embedder: Embedder, *, on_step: Callable[[int, int], None] | None = None
    ) -> int:
        """Move the store to another model; see :class:`memopt.memory.store.reembed.Move`.

        Args:
            on_step: called with (done, of).

        Returns:
            How many memories the store has now under the new model.

        Raises:
            InputError: the new model cannot embed a memory (a picture, for a text model), naming
                it; the store stays as it is.
        """
        if self.meta.model_id != embedder.model_id:
            Move(self.reader, embedder).run(on_step)
            self.index.ensure(rebuild=True)
        self.embedding.use(embedder)
        return int(self.database.memories.count_rows())

    # --- events and what others build on ----------------------------------------------------

    def events(self, kind: str | None = None) -> list[Event]:
        """Return events, oldest first."""
        return self.event_log.read(kind)
