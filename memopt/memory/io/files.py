"""Reading the memory files of an export, or of another tool: found, checked, one row at a time.

What other tools write is told by its columns, whatever the files are called: memories
(``joint_embedding``), association graph (``links``) and long-term memories (``summary``), in the
folder itself or, a file per memory, in ``memories/``, ``short_term/``, ``archived/`` and
``long_term/``. Counts may be 32 bit, links plain ids, vectors of any float type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from memopt.errors import InputError, first_line
from memopt.memory.model import content as incoming
from memopt.memory.model.rows import holds_vectors
from memopt.memory.model.schema import (
    ARCHIVED,
    GRAPH_FILE,
    LONG_TERM_FILE,
    MEMORIES_FILE,
    TIERS,
    TIMESTAMP,
    Content,
    NewMemory,
)
from memopt.parquetfile import batches, one_line, open_parquet

MEMORIES, GRAPH, LONG_TERMS = "memories.parquet", "associations.parquet", "long_term.parquet"
MODEL_KEY = b"memopt.model_id"
CHUNK = 512
_FOLDERS = ("memories", "short_term", ARCHIVED, "long_term")
# Repeats ids and vectors of a file per memory beside it.
_INDEX = "multimodal_index.parquet"
# A memory must have these; the rest of MEMORIES_FILE is ours and may be absent.
_NEEDED = MEMORIES_FILE.names[:9]
_FIX = "export it again, or mend the file"
_BOUNDS = tuple(
    pa.scalar(moment, pa.timestamp("us")).cast(pa.int64()).as_py()
    for moment in (datetime.min, datetime.max)
)
# What a link weighs that names none, and the most a link can weigh.
_WHOLE = 1.0


@dataclass(frozen=True, slots=True)
class Files:
    """The files of an export, by kind."""

    memories: tuple[Path, ...] = ()
    graphs: tuple[Path, ...] = ()
    long_terms: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One memory as a file has it.

    Attributes:
        memory: its content, id, category and times; checked, without a vector.
        vector: float32 (dim,), finite and not zero.
        tier: None where the file has none.
    """

    memory: NewMemory
    vector: NDArray[np.float32]
    access_count: int
    last_access: datetime | None
    tier: str | None
    consolidated_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One long-term memory as a file has it."""

    memory_id: str
    category: str
    summary: str
    sources: tuple[str, ...]
    source_count: int
    consolidated_at: datetime | None
    origin: str


def find(folder: Path) -> Files:
    """Sort the Parquet files of a folder, or one file, by what they hold.

    Raises:
        InputError: there is none, one is damaged, or one holds something else.
    """
    if folder.is_file():
        paths = [folder]
    else:
        places = [folder, *(folder / name for name in _FOLDERS)]
        paths = [path for place in places for path in sorted(place.glob("[!.]*.parquet"))]
    kinds: dict[str, list[Path]] = {MEMORIES: [], GRAPH: [], LONG_TERMS: []}
    for path in paths:
        kinds[_kind(path)].append(path)
    if len(kinds[MEMORIES]) > 1:
        kinds[MEMORIES] = [path for path in kinds[MEMORIES] if path.name != _INDEX]
    if not any(kinds.values()):
        raise InputError(f"{folder / MEMORIES} is missing", fix="give the folder of an export")
    return Files(*(tuple(kinds[name]) for name in (MEMORIES, GRAPH, LONG_TERMS)))


def model_of(files: Files) -> str:
    """Return what made the vectors, '' where nobody wrote it down.

    Raises:
        InputError: the files name two models.
    """
    models = {}
    for path in files.memories:
        if name := (_metadata(path).get(MODEL_KEY) or b"").decode("utf-8", "replace"):
            models[name] = path
    if len(models) > 1:
        first, second = list(models)[:2]
        raise InputError(f"{models[second]} holds vectors of {second!r}, others of {first!r}")
    return next(iter(models), "")


def read_memories(files: Files) -> Iterator[Row]:
    """Yield every memory, checked.

    Raises:
        InputError: an id or time is missing, an id comes twice, a vector is NaN, infinite, zero or
            not as long as the first, or what :meth:`MemoryStore.add` refuses.
    """
    seen: set[str] = set()
    dim: int | None = None
    for path in files.memories:
        for batch in _batches(path, _NEEDED):
            vectors = _vectors(batch, path, dim)
            dim = dim or (vectors.shape[1] if len(vectors) else None)
            values = {
                field.name: _column(batch, path, field)
                for field in MEMORIES_FILE
                if field.name not in ("joint_embedding", "association_links")
            }
            linked = _plain(batch["association_links"], path)
            for at, vector in enumerate(vectors):
                row = _row(path, {k: v[at] for k, v in values.items()}, vector, linked[at])
                key = row.memory.memory_id or ""
                if key in seen:
                    raise InputError(f"{path}: memory {key!r} comes twice", fix=_FIX)
                seen.add(key)
                yield row


def read_summaries(files: Files) -> dict[str, Summary]:
    """Return the long-term memories by id, checked.

    Raises:
        InputError: one has no id or text, is too long, or comes twice.
    """
    found: dict[str, Summary] = {}
    for path in files.long_terms:
        for batch in _batches(path, LONG_TERM_FILE.names):
            columns = [_column(batch, path, field) for field in LONG_TERM_FILE]
            for values in zip(*columns, strict=True):
                row = dict(zip(LONG_TERM_FILE.names, values, strict=True))
                key = row["memory_id"]
                origin = f"{path}: long-term memory {key!r}"
                if not key or not (row["summary"] or "").strip():
                    raise InputError(f"{origin} has no {'summary' if key else 'id'}", fix=_FIX)
                if key in found:
                    raise InputError(f"{origin} comes twice", fix=_FIX)
                sources = tuple(row["source_memory_ids"] or ())
                for name in (key, row["category"] or "", *sources):
                    _check_id(name, origin)
                incoming.check_text(row["summary"], f"{origin}: summary")
                found[key] = Summary(
                    memory_id=key,
                    category=row["category"] or "",
                    summary=row["summary"],
                    sources=sources,
                    source_count=_count(row["source_count"], origin) or len(sources),
                    consolidated_at=row["consolidated_at"],
                    origin=origin,
                )
    return found


def read_links(files: Files) -> Iterator[list[tuple[str, str, float]]]:
    """Yield (memory, linked memory, weight), many at a time: of the graph, then of the memories.

    Raises:
        InputError: an id is missing, or a weight is no number above 0.
    """
    own = ((path, "association_links", _NEEDED) for path in files.memories)
    graphs = ((path, "links", GRAPH_FILE.names) for path in files.graphs)
    for path, column, needed in (*graphs, *own):
        if files.graphs and column != "links" and _is_ours(path):
            continue  # the graph beside it has the same
        for batch in _batches(path, needed, ["memory_id", column]):
            keys = _column(batch, path, GRAPH_FILE.field("memory_id"))
            links = _plain(batch[column], path)
            yield [
                (key or "", other, weight)
                for key, own in zip(keys, links, strict=True)
                for other, weight in _links(own, f"{path}: memory {key!r}")
                if _check_id(key, str(path))
            ]


def _metadata(path: Path) -> dict[bytes, bytes]:
    return open_parquet(path).schema_arrow.metadata or {}


def _is_ours(path: Path) -> bool:
    return MODEL_KEY in _metadata(path)


def _kind(path: Path) -> str:
    names = set(open_parquet(path).schema_arrow.names)
    if path.name in (MEMORIES, GRAPH, LONG_TERMS):
        return path.name
    for kind, needed in (
        (LONG_TERMS, {"memory_id", "summary", "source_memory_ids"}),
        (MEMORIES, {"memory_id", "joint_embedding"}),
        (GRAPH, {"memory_id", "links"}),
    ):
        if needed <= names:
            return kind
    raise InputError(
        f"{path} holds neither memories nor links nor summaries (columns {sorted(names)[:6]})",
        fix="move it elsewhere",
    )


def _batches(
    path: Path, needed: Sequence[str], wanted: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield ``wanted`` columns of a file that has all the ``needed`` ones; by default all known."""
    file = open_parquet(path)
    names = file.schema_arrow.names
    missing = [name for name in needed if name not in names]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]!r}", fix=f"columns: {', '.join(needed)}"
        )
    if len(set(names)) < len(names):
        raise InputError(f"{path} has a column twice", fix=_FIX)
    known = {*needed, *MEMORIES_FILE.names}
    return batches(file, path, CHUNK, wanted or [name for name in names if name in known])


def _column(batch: pa.RecordBatch, path: Path, field: pa.Field) -> list[Any]:
    """Return a column as Python values of a field's type; None where the file has none."""
    if field.name not in batch.schema.names:
        return [None] * batch.num_rows
    column = batch[field.name]
    try:
        if not pa.types.is_timestamp(field.type):
            column = column.cast(pa.large_binary() if field.type == pa.binary() else field.type)
            column.validate(full=True)
            return list(column.to_pylist())
        # What is finer than a microsecond goes; what is further away than a datetime does not fit.
        options = pc.CastOptions(TIMESTAMP, allow_time_truncate=True)
        column = pc.cast(column, options=options)
        bounds = pc.min_max(column.cast(pa.int64())).as_py()
        if bounds["min"] is not None and not (
            _BOUNDS[0] <= bounds["min"] <= bounds["max"] <= _BOUNDS[1]
        ):
            raise pa.ArrowInvalid("a time before the year 1 or after 9999")
        return list(column.to_pylist())
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: column {field.name!r} is {batch[field.name].type}, not {field.type} "
            f"({first_line(error)})",
            fix=_FIX,
        ) from error


def _plain(column: pa.Array, path: Path) -> list[Any]:
    with one_line(path, InputError):
        return list(column.to_pylist())


def _vectors(batch: pa.RecordBatch, path: Path, dim: int | None) -> NDArray[np.float32]:
    """Return float32 (n, dim) of a column of lists, checked."""
    column = batch["joint_embedding"]
    kind = column.type
    keys = _column(batch, path, MEMORIES_FILE.field("memory_id"))
    if not holds_vectors(kind):
        raise InputError(f"{path}: joint_embedding is {kind}, not lists of floats", fix=_FIX)
    lengths = [length or 0 for length in pc.list_value_length(column).to_pylist()]
    dim = dim or next(iter(lengths), None)
    for key, length in zip(keys, lengths, strict=True):
        if not length or length != dim:
            raise InputError(
                f"{path}: memory {key!r} has a vector of {length} numbers, not {dim or 'any'}",
                fix=_FIX,
            )
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    vectors: NDArray[np.float32] = flat.reshape(-1, dim or 1)
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    for at in np.flatnonzero(~finite | ~vectors.any(axis=1)):
        kind = "of zeros" if finite[at] else "with NaN or infinity"
        raise InputError(f"{path}: memory {keys[at]!r} has a vector {kind}", fix=_FIX)
    return vectors


def _row(path: Path, row: dict[str, Any], vector: NDArray[np.float32], links: Any) -> Row:
    key, origin = row["memory_id"], f"{path}: memory {row['memory_id']!r}"
    if not key or row["timestamp"] is None:
        raise InputError(f"{origin} has no {'timestamp' if key else 'id'}", fix=_FIX)
    text = row["text"] if (row["text"] or "").strip() else None
    content = Content(text=text, vision=row["vision_data"], audio=row["audio_data"])
    tier = row["tier"] or (ARCHIVED if path.parent.name == ARCHIVED else None)
    if tier is not None and tier not in TIERS:
        raise InputError(f"{origin} is of the unknown tier {tier!r}", fix=_FIX)
    for name in (key, row["category"] or ""):
        _check_id(name, origin)
    if content.modalities:
        incoming.check_content(content, origin)
    for _ in _links(links, origin):  # checked here, given by read_links
        pass
    return Row(
        memory=NewMemory(
            content=content,
            category=row["category"] or "",
            timestamp=row["timestamp"],
            expires_at=row["expires_at"],
            memory_id=key,
            origin=origin,
        ),
        vector=vector,
        access_count=_count(row["access_count"], origin),
        last_access=row["last_access"],
        tier=tier,
        consolidated_at=row["consolidated_at"],
    )


def _links(value: Any, origin: str) -> Iterator[tuple[str, float]]:
    """Yield (id, weight): of plain ids, of pairs or of {linked_id, weight}."""
    for link in value or ():
        if isinstance(link, dict):
            pair = (link.get("linked_id"), link.get("weight"))
        else:
            pair = (link, None) if isinstance(link, str) else tuple(link or (None, None))[:2]
        other, weight = pair[0], _WHOLE if pair[1] is None else pair[1]
        if not isinstance(other, str) or not other:
            raise InputError(f"{origin} has a link without an id", fix=_FIX)
        if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
            raise InputError(f"{origin} has a link of weight {weight!r}", fix=_FIX)
        if weight:
            yield other, min(_WHOLE, float(weight))


def _count(value: int | None, origin: str) -> int:
    if (value or 0) < 0:
        raise InputError(f"{origin} has a count of {value}", fix=_FIX)
    return value or 0


def _check_id(name: str | None, origin: str) -> bool:
    if name is None:
        raise InputError(f"{origin} has no id", fix=_FIX)
    if len(incoming.encoded(name, origin)) > incoming.MAX_ID_BYTES:
        raise InputError(f"{origin}: an id is longer than {incoming.MAX_ID_BYTES} bytes", fix=_FIX)
    return True
