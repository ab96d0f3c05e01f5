"""The words of every memory beside its text, as :mod:`memopt.memory.model.words` sees them.

A column of the table of memories, made with each row: what is indexed and compared with questions.
An encrypted store has none. A store of before gets it when it is opened to write, or by
:meth:`memopt.memory.MemoryStore.optimize`; until then its texts are searched as they are.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from memopt.errors import ConsolidationError
from memopt.memory.model import payload
from memopt.memory.model.filters import DELETED
from memopt.memory.model.schema import WORDS
from memopt.memory.model.words import words
from memopt.memory.store.access_counts import cover_ids

if TYPE_CHECKING:
    from memopt.memory.memory_store import MemoryStore

_LOG = logging.getLogger(__name__)
_NAME = WORDS.name
# The columns that were indexed before there were words.
TEXTS = ("text", "summary")
_CHUNK = 4096
_SCHEMA = pa.schema([pa.field("memory_id", pa.string(), nullable=False), WORDS])


def indexed(table: Any) -> tuple[str, ...]:
    """Return the columns of ``memories`` to search for words: the words, or the texts of before."""
    there = {column for index in table.list_indices() for column in index.columns}
    if _NAME in there:
        return (_NAME,)
    return tuple(name for name in TEXTS if name in there)


def has_words(store: MemoryStore) -> bool:
    """Say whether the table has the column."""
    return _NAME in store.memories.schema.names


def with_words(store: MemoryStore, table: pa.Table) -> pa.Table:
    """Return whole rows with their words, where the store has the column."""
    if not has_words(store):
        return table
    return table.append_column(WORDS, _words_of(store, table))


def upgrade(store: MemoryStore) -> None:
    """Give the rows of a store of before their words; without effect where all have them.

    Raises:
        ConsolidationError: the store cannot be written.
    """
    from memopt.memory.search.searcher import create_indices

    if store.cipher is not None:
        return
    with store.changing():
        if not has_words(store):
            store.memories.add_columns(WORDS)
        while True:
            missing = store.memories.search().where(f"{_NAME} IS NULL AND tier <> '{DELETED}'")
            ids = missing.select(["memory_id"]).limit(_CHUNK).to_arrow()["memory_id"].to_pylist()
            if not ids:
                break
            found = store.rows(ids, ["memory_id", *payload.CONTENT, "codec", "packed"])
            made = pa.table([found["memory_id"], _words_of(store, found)], schema=_SCHEMA)
            cover_ids(store.memories)
            merge = store.memories.merge_insert("memory_id").when_matched_update_all()
            merge.execute(made)
        cover_ids(store.memories)
        create_indices(store.database)
        for index in store.memories.list_indices():
            # What a word is searched in from now on is the words.
            if set(index.columns) <= set(TEXTS):
                store.memories.drop_index(index.name)


def opened(store: MemoryStore) -> tuple[str, ...]:
    """Return the columns to search for words, after an upgrade where the store can be written."""
    found = indexed(store.memories)
    if store.place.local is not None and store.cipher is None and found != (_NAME,):
        # One that was cut short is finished: the index is made last.
        try:
            upgrade(store)
        except ConsolidationError as error:
            _LOG.info("%s is searched without its words: %s", store.place, error)
        found = indexed(store.memories)
    return found


def _words_of(store: MemoryStore, table: pa.Table) -> pa.Array:
    """Return the words of whole rows; null in an encrypted store."""
    if store.cipher is not None:
        return pa.nulls(table.num_rows, WORDS.type)
    plain = payload.unseal(table, None)
    pairs = zip(plain["text"].to_pylist(), plain["summary"].to_pylist(), strict=True)
    return pa.array(
        [" ".join(words(f"{text or ''} {summary or ''}")) for text, summary in pairs], WORDS.type
    )
