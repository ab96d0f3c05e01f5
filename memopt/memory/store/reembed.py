"""Move a store to another model; the old vectors are searched until the new ones are all there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memopt.errors import ConsolidationError, InputError
from memopt.memory.model import content as incoming
from memopt.memory.model import rows
from memopt.memory.model.filters import one_of
from memopt.memory.model.schema import WORDS, Content, Embedder, memories_schema
from memopt.memory.search import searcher as searching

if TYPE_CHECKING:
    from memopt.memory.memory_store import MemoryStore

# The new vectors, until they take the place of the old ones.
TABLE = "reembed"
# While vectors and meta disagree no query may be answered.
MOVING = "moving to "
_CHUNK = 256


def reembed(
    store: MemoryStore, embedder: Embedder, *, on_step: Callable[[int, int], None] | None = None
) -> int:
    """Embed every memory with another model and move the store to it.

    New vectors are collected in a table of their own, a commit per chunk; a run that was killed
    goes on where it stopped. Then, under the writer lock, memories that were added or changed
    meanwhile are embedded too and the table is replaced in one commit. Summaries without content
    are embedded by their text.

    Args:
        embedder: the new model; its dimension may differ.
        on_step: called with (done, of).

    Returns:
        How many memories the store has now under the new model.

    Raises:
        InputError: the new model cannot embed a memory (a picture, for a text model), naming it;
            the store stays as it is.
    """
    folder = store.database
    meta = store.meta
    if meta.model_id == embedder.model_id:
        return int(store.memories.count_rows())
    schema = pa.schema(
        [
            pa.field("memory_id", pa.string()),
            pa.field("content", pa.string()),
            pa.field("vector", pa.list_(pa.float32(), embedder.dim)),
        ],
        metadata={"model_id": embedder.model_id},
    )
    table = unfinished(store)
    if table is not None and dict(table.schema.metadata or {}) != schema.metadata:
        folder.drop_table(TABLE)
        table = None
    if table is None:
        table = folder.create_table(TABLE, schema=schema)
    if not meta.model_id.startswith(MOVING):
        _collect(store, embedder, table, schema, on_step)
    with store.changing():
        if not store.meta.model_id.startswith(MOVING):
            _collect(store, embedder, table, schema, None)
            store.write_meta(model_id=f"{MOVING}{embedder.model_id}")
        _replace(store, embedder, table)
        folder.drop_table(TABLE)
    store.index.ensure(rebuild=True)
    return int(store.memories.count_rows())


def unfinished(store: MemoryStore) -> Any | None:
    """Return the table of a run that was cut short, or is under way; None where there is none."""
    database = store.database
    return database.open_table(TABLE) if TABLE in database.list_tables().tables else None


def _collect(
    store: MemoryStore,
    embedder: Embedder,
    table: Any,
    schema: pa.Schema,
    on_step: Callable[[int, int], None] | None,
) -> None:
    """Embed what is not in ``table``, or is there with other content."""
    known: dict[str, str] = {}
    for batch in table.search().select(["memory_id", "content"]).limit(None).to_batches(8192):
        known.update(zip(batch["memory_id"].to_pylist(), batch["content"].to_pylist(), strict=True))
    ids = [
        key
        for batch in store.scan(columns=["memory_id"], batch_size=8192)
        for key in batch["memory_id"].to_pylist()
    ]
    for start in range(0, len(ids), _CHUNK):
        part = ids[start : start + _CHUNK]
        found = store.unpack(store.rows(part))
        contents = [_content(row) for row in found.to_pylist()]
        # By every byte: a text in another normalisation may have another vector.
        secret = store.id_key().value
        marks = [incoming.content_id(content, "", secret) for content in contents]
        names = found["memory_id"].to_pylist()
        new = [at for at, name in enumerate(names) if known.get(name) != marks[at]]
        if new:
            try:
                vectors = embedder.embed([contents[at] for at in new])
            except InputError as error:
                raise InputError(
                    f"{embedder.model_id} cannot embed a memory among {names[new[0]]!r} and the "
                    f"{len(new) - 1} after it: {error}",
                    fix="use a model for all modalities of the store",
                ) from error
            changed = [names[at] for at in new if names[at] in known]
            if changed:
                table.delete(one_of("memory_id", changed))
            columns = [
                pa.array([names[at] for at in new]),
                pa.array([marks[at] for at in new]),
                rows.vectors_column(rows.unit(np.asarray(vectors), embedder.dim)),
            ]
            table.add(pa.table(columns, schema=schema))
        if on_step:
            on_step(start + len(part), len(ids))


def _replace(store: MemoryStore, embedder: Embedder, table: Any) -> None:
    """Swap the vectors in one commit, unless that is done already, and say so in the meta."""
    memories = store.database.open_table("memories")
    models = memories.search().select(["model_id"]).limit(None).to_arrow()["model_id"]
    if pc.all(pc.equal(models, embedder.model_id)).as_py() is not True:
        schema = memories_schema(embedder.dim)
        if WORDS.name in memories.schema.names:
            schema = schema.append(WORDS)
        old = memories.search().limit(None).to_batches(_CHUNK)
        stream = pa.RecordBatchReader.from_batches(schema, _moved(old, table, schema, embedder))
        memories.add(stream, mode="overwrite")
    store.write_meta(model_id=embedder.model_id, dim=embedder.dim)
    store.look_again()
    searching.create_indices(store.database)


def _moved(old: Any, table: Any, schema: pa.Schema, embedder: Embedder) -> Iterator[pa.RecordBatch]:
    for batch in old:
        names = batch["memory_id"].to_pylist()
        query = table.search().where(one_of("memory_id", names)).limit(None)
        new = query.to_arrow()
        at = {name: row for row, name in enumerate(new["memory_id"].to_pylist())}
        missing = [name for name in names if name not in at]
        if missing:
            raise ConsolidationError(
                f"memory {missing[0]!r} has no new vector", fix="run the command again"
            )
        vectors = new["vector"].combine_chunks().take(pa.array([at[name] for name in names]))
        columns = []
        for field in schema:
            if field.name == "joint_embedding":
                columns.append(vectors.cast(field.type))
            elif field.name == "model_id":
                columns.append(pa.repeat(pa.scalar(embedder.model_id), len(names)))
            else:
                columns.append(batch[field.name].cast(field.type))
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _content(row: dict[str, Any]) -> Content:
    content = Content(text=row["text"], vision=row["vision_data"], audio=row["audio_data"])
    return content if content.modalities else Content(text=row["summary"] or "")
