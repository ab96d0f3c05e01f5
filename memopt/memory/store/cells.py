"""Rows as the table of memories has them: packed, encrypted, with the words of their texts.

The words are a column beside the text, made with each row by :mod:`memopt.memory.model.words`: what
is indexed and compared with questions. An encrypted store has none. A store of before gets it when
it is opened to write, or by :meth:`memopt.memory.MemoryStore.optimize`; until then its texts are
searched as they are.
"""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa

from memopt.errors import ConsolidationError
from memopt.memory.model import content, payload
from memopt.memory.model.filters import DELETED
from memopt.memory.model.schema import WORDS, Content, memories_schema
from memopt.memory.model.signs import fitted
from memopt.memory.model.words import words
from memopt.memory.store.creation import create_indices
from memopt.memory.store.database import Database

_LOG = logging.getLogger(__name__)
_CHUNK = 4096
# The columns that were indexed before there were words.
_TEXTS = ("text", "summary")


class Cells:
    """Packs and opens the content of rows of one database.

    Attributes:
        database: the one.
        word_columns: the columns to search for words: the words, or the texts of a store of before.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.word_columns = self._indexed()
        if database.place.local is not None and not self.has_word_index and not database.cipher:
            # One that was cut short is finished: the index is made last.
            try:
                self.upgrade()
            except ConsolidationError as error:
                _LOG.info("%s is searched without its words: %s", database.place, error)

    @property
    def has_word_index(self) -> bool:
        """Whether words are searched, rather than texts."""
        return self.word_columns == (WORDS.name,)

    @property
    def has_words(self) -> bool:
        """Whether the table has the column."""
        return WORDS.name in self.database.memories.schema.names

    def content_id(self, what: Content, category: str = "", turn: int = 0) -> str:
        """Return the id this content gets when none is chosen (keyed in an encrypted store).

        Args:
            turn: 1 for the next id, where other content took the first, and so on.
        """
        return content.content_ids(what, category, self.database.id_key().value, turn)[0]

    def pack(self, table: pa.Table, *, compress: bool = True) -> pa.Table:
        """Return whole rows, as they are stored or all opened, with their content compressed.

        And encrypted where the store is.
        """
        opened = self.unpack(table) if any(table["codec"].to_pylist()) else table
        database = self.database
        return payload.seal(
            opened, compress=compress, cipher=database.cipher, store_key=database.id_key().value
        )

    def unpack(self, table: pa.Table) -> pa.Table:
        """Return stored rows with their content back in the plain columns.

        Raises:
            ConsolidationError: a row is damaged, or holds what was written for another.
        """
        key, only_tied = self.database.id_key()
        return payload.unseal(table, self.database.cipher, key, only_tied=only_tied)

    def stored(self, table: pa.Table) -> pa.Table:
        """Return whole rows as the table has them: with their words, or encrypted."""
        schema = memories_schema(self.database.dim)
        table = self.with_words(table.select(schema.names).cast(schema))
        if self.database.cipher is None or not table.num_rows:
            return table
        plain = np.array([not codec for codec in table["codec"].to_pylist()])
        sealed = self.pack(table.filter(pa.array(plain)), compress=False)
        return pa.concat_tables([table.filter(pa.array(~plain)), sealed])

    def fitted(self, table: pa.Table) -> pa.Table:
        """Return stored rows in the table's own schema: compact where it is."""
        return fitted(self.database.memories.schema, table)

    def with_words(self, table: pa.Table) -> pa.Table:
        """Return whole rows with their words, where the store has the column."""
        return table.append_column(WORDS, self._words_of(table)) if self.has_words else table

    def upgrade(self) -> None:
        """Give the rows of a store of before their words; without effect where all have them.

        Raises:
            ConsolidationError: the store cannot be written.
        """
        database = self.database
        if database.cipher is not None:
            self.word_columns = self._indexed()
            return
        with database.changing():
            if not self.has_words:
                database.memories.add_columns(WORDS)
            columns = ["memory_id", *payload.CONTENT, "codec", "packed"]
            missing = f"{WORDS.name} IS NULL AND tier <> '{DELETED}'"
            while True:
                found = database.memories.search().where(missing).select(columns).limit(_CHUNK)
                table = found.to_arrow()
                if not table.num_rows:
                    break
                made = [table["memory_id"], self._words_of(table)]
                database.replace(pa.table(made, schema=database.schema(["memory_id", WORDS.name])))
            create_indices(database.connection)
            for index in database.memories.list_indices():
                # What a word is searched in from now on is the words.
                if set(index.columns) <= set(_TEXTS):
                    database.memories.drop_index(index.name)
        self.word_columns = self._indexed()

    def _indexed(self) -> tuple[str, ...]:
        indices = self.database.memories.list_indices()
        there = {column for index in indices for column in index.columns}
        if WORDS.name in there:
            return (WORDS.name,)
        return tuple(name for name in _TEXTS if name in there)

    def _words_of(self, table: pa.Table) -> pa.Array:
        """Return the words of whole rows; null in an encrypted store."""
        if self.database.cipher is not None:
            return pa.nulls(table.num_rows, WORDS.type)
        plain = payload.unseal(table, None)
        pairs = zip(plain["text"].to_pylist(), plain["summary"].to_pylist(), strict=True)
        made = [" ".join(words(f"{text or ''} {summary or ''}")) for text, summary in pairs]
        return pa.array(made, WORDS.type)
