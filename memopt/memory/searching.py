"""Search by vector, by words, and by both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from memopt.errors import ConsolidationError, InputError
from memopt.memory import payload, rows
from memopt.memory.filters import expression, utc
from memopt.memory.incoming import check_text
from memopt.memory.schema import SHORT_TERM, Filter, Hit, memories_schema

if TYPE_CHECKING:
    from memopt.memory.store import MemoryStore

MAX_TOP_K = 10_000
# Reciprocal rank fusion: Cormack, Clarke, Buettcher, SIGIR 2009, whose k is 60.
_RRF_K = 60
# Each list is read deeper than asked, so that what is second in both can win.
_FUSION_DEPTH = 4
_TEXT_COLUMNS = ("text", "summary")
_SELDOM = (
    "vision_data",
    "audio_data",
    "packed",
    "summary",
    "source_memory_ids",
    "source_count",
    "consolidated_at",
)
# Rows that :func:`nearest` returns for each that is wanted.
SPARE = 4
_ID_ONLY = ("memory_id", "expires_at")
# What it takes to rank rows and to read the best of them afterwards.
RANKED = ("memory_id", "expires_at", "joint_embedding", "_rowid")
ALWAYS = tuple(name for name in memories_schema(1).names if name not in _SELDOM)


def create_indices(database: Any) -> None:
    """Give a new store its id and word indices; they are empty and grow with optimize()."""
    from lancedb.index import FTS, BTree

    memories = database.open_table("memories")
    present = {column for index in memories.list_indices() for column in index.columns}
    configs = {"memory_id": BTree()}
    for column in _TEXT_COLUMNS:
        # Memories come in any language: no English stemming or stop words; ICU splits scripts
        # that have no spaces.
        configs[column] = FTS(
            base_tokenizer="icu", stem=False, remove_stop_words=False, ascii_folding=True
        )
    for column, config in configs.items():
        if column not in present:
            memories.create_index(column, config=config)
    edges = database.open_table("edges")
    if not edges.list_indices():
        edges.create_index("source", config=BTree())
        edges.create_index("target", config=BTree())


def check_top_k(top_k: int) -> None:
    """Refuse a number of results that makes no sense.

    Raises:
        InputError: it is not between 1 and MAX_TOP_K.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
        raise InputError(f"top_k is {top_k!r}", fix=f"give a whole number from 1 to {MAX_TOP_K}")


def search(
    store: MemoryStore,
    vector: NDArray[Any] | Sequence[float] | None,
    *,
    text: str | None,
    where: Filter,
    top_k: int,
) -> list[Hit]:
    """Do what :meth:`MemoryStore.search` says, without counting the access."""
    check_top_k(top_k)
    if text is not None:
        check_text(text, "query")
        text = text if text.strip() else None
    if vector is None and text is None:
        raise InputError("the query is empty", fix="give a vector or some words")
    query = None if vector is None else query_vector(store, vector)
    if text is not None and store.cipher is not None:
        if query is None:
            raise ConsolidationError(
                "an encrypted store has no word index", fix="search by meaning, with a vector"
            )
        text = None
    if text is None:
        assert query is not None
        found = _vector_rows(store, query, where, top_k)
        return _hits(store, found, np.clip(1 - found["_distance"].to_numpy(), 0, 1), top_k)
    if query is None:
        found = _text_rows(store, text, where, top_k)
        scores = found["_score"].to_numpy()
        return _hits(store, found, scores / max(scores.max(initial=0), 1e-9), top_k)
    depth = min(MAX_TOP_K, top_k * _FUSION_DEPTH)
    return _fuse(
        store,
        _vector_rows(store, query, where, depth, _ID_ONLY),
        _text_rows(store, text, where, depth, _ID_ONLY),
        top_k,
    )


def candidates(
    store: MemoryStore, vector: NDArray[Any] | Sequence[float], *, where: Filter, top_k: int
) -> list[tuple[str, float]]:
    """Do what :meth:`MemoryStore.candidates` says."""
    check_top_k(top_k)
    found = _vector_rows(store, query_vector(store, vector), where, top_k, _ID_ONLY)
    scores = np.clip(1 - found["_distance"].to_numpy(), 0, 1).tolist()
    return list(zip(found["memory_id"].to_pylist(), scores, strict=True))


def nearest(
    store: MemoryStore, query: NDArray[np.float32], *, where: Filter, top_k: int
) -> pa.Table:
    """Return rows near the query with the columns of ``RANKED``, by rough distances.

    The first ``top_k / SPARE`` are among them; the caller finds them by their vectors.
    """
    return _vector_rows(store, query, where, top_k, RANKED).select(RANKED)


def with_words(store: MemoryStore, text: str, *, where: Filter, top_k: int) -> pa.Table:
    """Return the rows with the words of ``text`` in them, with the columns of ``RANKED``."""
    return _text_rows(store, text, where, top_k, RANKED).select(RANKED)


def query_vector(store: MemoryStore, vector: NDArray[Any] | Sequence[float]) -> NDArray[np.float32]:
    """Return a query of length 1, float32 (dim,).

    Raises:
        InputError: another shape, NaN, infinity or all zeros.
    """
    try:
        array = np.asarray(vector)
    except ValueError as error:
        raise InputError(f"the query vector is no vector: {error}") from error
    if array.ndim != 1:
        raise InputError(f"the query vector has shape {array.shape}, not ({store.dim},)")
    query: NDArray[np.float32] = rows.unit(array[None, :], store.dim, "query vector")[0]
    return query


def _vector_rows(
    store: MemoryStore,
    query: NDArray[np.float32],
    where: Filter,
    top_k: int,
    names: Sequence[str] | None = None,
) -> pa.Table:
    # Who asks for more than it needs, with their vectors, compares them itself.
    spare = SPARE if names is RANKED else 1

    def build(count: int) -> list[Any]:
        search = store.query().nearest_to(query).column("joint_embedding").distance_type("cosine")
        return [store.tune(search, count, spare)]

    return _living(store, build, where, top_k, "_distance", names)


def _text_rows(
    store: MemoryStore,
    text: str,
    where: Filter,
    top_k: int,
    names: Sequence[str] | None = None,
) -> pa.Table:
    from lancedb.query import MatchQuery

    def build(count: int) -> list[Any]:
        # A match query takes the words as they are: there is no query language to break out of.
        # One query per column, since Lance stops early only in those: 2 ms instead of 15 ms.
        return [store.query().nearest_to_text(MatchQuery(text, column)) for column in _TEXT_COLUMNS]

    return _living(store, build, where, top_k, "_score", names)


def _living(
    store: MemoryStore,
    build: Callable[[int], list[Any]],
    where: Filter,
    top_k: int,
    score: str,
    columns: Sequence[str] | None,
) -> pa.Table:
    """Run searches, and leave out what has expired and is not erased yet.

    Done after the search: expired rows are few, and a filter would cost every query a scan. Without
    ``columns`` all that hold something in the rows found are read.
    """
    now = utc(store.clock())
    condition = expression(where)
    count = top_k
    while True:
        names = columns or [*ALWAYS, *sorted(store.wanted_columns)]
        searches = [
            (search if condition is None else search.where(condition))
            .select([*names, score])
            .limit(count)
            for search in build(count)
        ]
        found = _best(store.fetch_all(searches), score, count)
        missing = set() if columns else needed_columns(found) - store.wanted_columns
        if missing:
            # The first row that uses a column is met: it is read from now on. One query sees one
            # version, so the search is repeated rather than completed.
            store.wanted_columns |= missing
            continue
        alive = [at is None or at > now for at in found["expires_at"].to_pylist()]
        if sum(alive) >= top_k or found.num_rows < count:
            return found.filter(pa.array(alive, pa.bool_())).slice(0, top_k)
        count *= 2


def _best(tables: list[pa.Table], score: str, count: int) -> pa.Table:
    """Join the answers of several columns; a memory that several found keeps its best score."""
    if len(tables) == 1:
        return tables[0]
    joined = pa.concat_tables(tables).sort_by([(score, "descending"), ("memory_id", "ascending")])
    ids = joined["memory_id"].to_pylist()
    first = {key: at for at, key in reversed(list(enumerate(ids)))}
    return joined.take(pa.array(sorted(first.values())[:count], pa.int64()))


def needed_columns(found: pa.Table) -> set[str]:
    """Return the seldom used columns that hold something in these rows.

    Every column read costs a search about 0.3 ms, and most stores use only some of them.
    """
    needed = set()
    if pc.any(found["has_vision"]).as_py():
        needed.add("vision_data")
    if pc.any(found["has_audio"]).as_py():
        needed.add("audio_data")
    if any(found["codec"].to_pylist()):
        needed |= {"packed", "vision_data", "audio_data", "summary"}
    if any(tier != SHORT_TERM for tier in found["tier"].to_pylist()):
        needed |= {"summary", "source_memory_ids", "source_count", "consolidated_at"}
    return needed


def _fuse(store: MemoryStore, by_vector: pa.Table, by_text: pa.Table, top_k: int) -> list[Hit]:
    scores: dict[str, float] = {}
    for found in (by_vector, by_text):
        for rank, memory_id in enumerate(found["memory_id"].to_pylist()):
            scores[memory_id] = scores.get(memory_id, 0.0) + 1 / (_RRF_K + 1 + rank)
    best = sorted(scores, key=lambda memory_id: (-scores[memory_id], memory_id))[:top_k]
    table = store.rows(best)
    first_in_both = 2 / (_RRF_K + 1)
    values = [scores[key] / first_in_both for key in table["memory_id"].to_pylist()]
    return _hits(store, table, np.array(values), top_k)


def _hits(store: MemoryStore, found: pa.Table, scores: NDArray[Any], top_k: int) -> list[Hit]:
    memories = rows.memories(
        payload.unseal(found, store.cipher), store.dim, extra_accesses=store.pending_touches()
    )
    hits = [Hit(memory, float(score)) for memory, score in zip(memories, scores, strict=True)]
    hits.sort(key=lambda hit: (-hit.score, hit.memory.memory_id))
    return hits[:top_k]
