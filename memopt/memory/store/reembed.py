"""Move a store to another model; the old vectors are searched until the new ones are all there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memopt.errors import ConsolidationError, InputError
from memopt.memory.model import rows
from memopt.memory.model.content import content_id
from memopt.memory.model.filters import EVERYTHING, one_of
from memopt.memory.model.schema import CONTENT_COLUMNS, WORDS, Content, Embedder, memories_schema
from memopt.memory.store.database import Database
from memopt.memory.store.reader import Reader

# The new vectors, until they take the place of the old ones.
TABLE = "reembed"
# While vectors and meta disagree no query may be answered.
MOVING = "moving to "
_CHUNK = 256


class Move:
    """Moves one store to another model.

    New vectors are collected in a table of their own, a commit per chunk; a run that was killed
    goes on where it stopped. Then, under the writer lock, memories that were added or changed
    meanwhile are embedded too and the table is replaced in one commit. Summaries without content
    are embedded by their text.

    Args:
        embedder: the new model; its dimension may differ.
    """

    def __init__(self, reader: Reader, embedder: Embedder) -> None:
        self._database, self._reader, self._embedder = reader.database, reader, embedder
        self._schema = pa.schema(
            [
                pa.field("memory_id", pa.string()),
                pa.field("content", pa.string()),
                pa.field("vector", pa.list_(pa.float32(), embedder.dim)),
            ],
            metadata={"model_id": embedder.model_id},
        )

    def run(self, on_step: Callable[[int, int], None] | None = None) -> None:
        """Embed what is left and take the new vectors; without effect under that model already."""
        database, model_id = self._database, self._embedder.model_id
        meta = database.meta
        if meta.model_id == model_id:
            return
        table = unfinished(database)
        if table is not None and dict(table.schema.metadata or {}) != self._schema.metadata:
            database.connection.drop_table(TABLE)
            table = None
        if table is None:
            table = database.connection.create_table(TABLE, schema=self._schema)
        if not meta.model_id.startswith(MOVING):
            self._collect(table, on_step)
        with database.changing():
            if not database.meta.model_id.startswith(MOVING):
                self._collect(table, None)
                database.write_meta(model_id=f"{MOVING}{model_id}")
            self._replace(table)
            database.connection.drop_table(TABLE)

    def _collect(self, table: Any, on_step: Callable[[int, int], None] | None) -> None:
        """Embed what is not in ``table``, or is there with other content."""
        found = table.search().select(["memory_id", "content"]).limit(None).to_arrow()
        known = dict(zip(found["memory_id"].to_pylist(), found["content"].to_pylist(), strict=True))
        ids = self._reader.table(EVERYTHING, ["memory_id"], 8192)["memory_id"].to_pylist()
        done = 0
        for part in rows.chunks(ids, _CHUNK):
            self._embed(table, part, known)
            done += len(part)
            if on_step:
                on_step(done, len(ids))

    def _embed(self, table: Any, part: list[str], known: dict[str, str]) -> None:
        found = self._reader.cells.unpack(self._reader.rows(part))
        contents = [_content(row) for row in found.to_pylist()]
        # By every byte: a text in another normalisation may have another vector.
        secret = self._database.id_key().value
        marks = [content_id(content, "", secret) for content in contents]
        names = found["memory_id"].to_pylist()
        new = [at for at, name in enumerate(names) if known.get(name) != marks[at]]
        if not new:
            return
        try:
            vectors = self._embedder.embed([contents[at] for at in new])
        except InputError as error:
            raise InputError(
                f"{self._embedder.model_id} cannot embed a memory among {names[new[0]]!r} and the "
                f"{len(new) - 1} after it: {error}",
                fix="use a model for all modalities of the store",
            ) from error
        changed = [names[at] for at in new if names[at] in known]
        if changed:
            table.delete(one_of("memory_id", changed))
        columns = [
            pa.array([names[at] for at in new]),
            pa.array([marks[at] for at in new]),
            rows.vectors_column(rows.unit(np.asarray(vectors), self._embedder.dim)),
        ]
        table.add(pa.table(columns, schema=self._schema))

    def _replace(self, table: Any) -> None:
        """Swap the vectors in one commit, unless that is done already, and say so in the meta."""
        database, embedder = self._database, self._embedder
        memories = database.connection.open_table("memories")
        models = memories.search().select(["model_id"]).limit(None).to_arrow()["model_id"]
        if pc.all(pc.equal(models, embedder.model_id)).as_py() is not True:
            schema = memories_schema(embedder.dim)
            if WORDS.name in memories.schema.names:
                schema = schema.append(WORDS)
            old = memories.search().limit(None).to_batches(_CHUNK)
            database.overwrite_memories(_moved(old, table, schema, embedder.model_id), schema)
        database.write_meta(model_id=embedder.model_id, dim=embedder.dim)
        database.remake_indices()


def unfinished(database: Database) -> Any | None:
    """Return the table of a run that was cut short, or is under way; None where there is none."""
    names = database.connection.list_tables().tables
    return database.connection.open_table(TABLE) if TABLE in names else None


def _moved(old: Any, table: Any, schema: pa.Schema, model_id: str) -> Iterator[pa.RecordBatch]:
    for batch in old:
        names = batch["memory_id"].to_pylist()
        new = table.search().where(one_of("memory_id", names)).limit(None).to_arrow()
        at = {name: row for row, name in enumerate(new["memory_id"].to_pylist())}
        missing = [name for name in names if name not in at]
        if missing:
            raise ConsolidationError(
                f"memory {missing[0]!r} has no new vector", fix="run the command again"
            )
        vectors = new["vector"].combine_chunks().take(pa.array([at[name] for name in names]))
        made = {"joint_embedding": vectors, "model_id": pa.repeat(pa.scalar(model_id), len(names))}
        columns = [
            (made[field.name] if field.name in made else batch[field.name]).cast(field.type)
            for field in schema
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _content(row: dict[str, Any]) -> Content:
    content = Content(**{short: row[name] for name, short in CONTENT_COLUMNS.items()})
    return content if content.modalities else Content(text=row["summary"] or "")
