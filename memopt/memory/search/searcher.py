"""Search by vector, by words, and by both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from memopt.errors import ConsolidationError, InputError
from memopt.memory.model import rows
from memopt.memory.model.content import check_text
from memopt.memory.model.filters import expression, utc
from memopt.memory.model.schema import BITS, SHORT_TERM, WORDS, Filter, Hit, memories_schema
from memopt.memory.model.words import query_words
from memopt.memory.search.relevance import Question, neighbours
from memopt.memory.store import signs as compact

if TYPE_CHECKING:
    from memopt.memory.memory_store import MemoryStore

_T = TypeVar("_T")
MAX_TOP_K = 10_000
# Rows looked at for a question, so that what is second in both can win.
_LEAST = 40
_SELDOM = (
    "vision_data",
    "audio_data",
    "packed",
    "summary",
    "source_memory_ids",
    "source_count",
    "consolidated_at",
)
# Searches run at the same time: enough for every core, few enough that others get their turn.
_AT_ONCE = 16
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
    configs: dict[str, Any] = {"memory_id": BTree()}
    if WORDS.name in memories.schema.names:
        # memopt.memory.model.words made them: there is nothing left to split, fold or leave out.
        configs[WORDS.name] = FTS(
            base_tokenizer="whitespace",
            lower_case=False,
            stem=False,
            remove_stop_words=False,
            ascii_folding=False,
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
    return _again(store, lambda: _search(store, vector, text=text, where=where, top_k=top_k))


def _search(
    store: MemoryStore,
    vector: NDArray[Any] | Sequence[float] | None,
    *,
    text: str | None,
    where: Filter,
    top_k: int,
) -> list[Hit]:
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
        # Of a compact store many more rows are compared than found: these are read afterwards.
        columns = _ID_ONLY if store.compact else None
        (found,) = _living(store, [_by_vector(store, query, top_k, columns)], where)
        if store.compact:
            near = dict(
                zip(found["memory_id"].to_pylist(), found["_distance"].to_pylist(), strict=True)
            )
            found = store.rows(list(near))
            distances = [near[key] for key in found["memory_id"].to_pylist()]
            return _hits(store, found, np.clip(1 - np.array(distances), 0, 1), top_k)
        return _hits(store, found, np.clip(1 - found["_distance"].to_numpy(), 0, 1), top_k)
    if query is None:
        (found,) = _living(store, [_by_words(store, text, top_k)], where)
        scores = found["_score"].to_numpy()
        return _hits(store, found, scores / max(scores.max(initial=0), 1e-9), top_k)
    answers = related(store, query, text, where=where, top_k=top_k)
    best = sorted(answers.similar, key=lambda key: (-answers.similar[key], key))[:top_k]
    found = _found(store, answers.table, best)
    values = [answers.similar[key] for key in found["memory_id"].to_pylist()]
    return _hits(store, found, np.array(values), top_k)


def _found(store: MemoryStore, ranked: pa.Table, ids: Sequence[str]) -> pa.Table:
    """Return what holds something of rows just ranked, from where they were seen."""
    at = dict(zip(ranked["memory_id"].to_pylist(), ranked["_rowid"].to_pylist(), strict=True))
    names = [*ALWAYS, *sorted(store.wanted_columns)]
    found = store.rows_at({key: at[key] for key in ids}, names) if ids else None
    if found is None:
        return store.rows(ids)
    needed = needed_columns(found) - set(names)
    if needed:
        # The next search reads them at once.
        store.wanted_columns |= needed
        return store.rows(ids)
    return found


def candidates(
    store: MemoryStore,
    vectors: Sequence[NDArray[Any] | Sequence[float]],
    *,
    where: Filter,
    top_k: int,
) -> list[list[tuple[str, float]]]:
    """Do what :meth:`MemoryStore.candidates` says, for several vectors at the same time."""
    check_top_k(top_k)
    return _again(store, lambda: _candidates(store, vectors, where=where, top_k=top_k))


def _candidates(
    store: MemoryStore,
    vectors: Sequence[NDArray[Any] | Sequence[float]],
    *,
    where: Filter,
    top_k: int,
) -> list[list[tuple[str, float]]]:
    found: list[list[tuple[str, float]]] = []
    for start in range(0, len(vectors), _AT_ONCE):
        part = [query_vector(store, vector) for vector in vectors[start : start + _AT_ONCE]]
        asks = [_by_vector(store, query, top_k, _ID_ONLY) for query in part]
        for table in _living(store, asks, where):
            scores = np.clip(1 - table["_distance"].to_numpy(), 0, 1).tolist()
            found.append(list(zip(table["memory_id"].to_pylist(), scores, strict=True)))
    return found


def nearest(
    store: MemoryStore, query: NDArray[np.float32], *, where: Filter, top_k: int
) -> pa.Table:
    """Return rows near the query, by rough distances, with the columns of ``RANKED``.

    Args:
        query: float32 (dim,), of length 1.
        top_k: rows at most, SPARE times as many as are wanted: the first ``top_k / SPARE`` are
            among them, and the caller finds them by their vectors.
    """

    def run() -> pa.Table:
        (found,) = _living(store, [_by_vector(store, query, top_k, RANKED)], where)
        return found.select(RANKED)

    return _again(store, run)


def _again(store: MemoryStore, run: Callable[[], _T]) -> _T:
    """Search once more where the vectors were made compact, or plain again, meanwhile."""
    try:
        return run()
    except ConsolidationError:
        if store.place.local is None:
            raise
        before = store.compact
        # Waits until the indices are there as well.
        with suppress(ConsolidationError), store.exclusive():
            store.look_again()
        if store.compact == before:
            raise
        return run()


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What may answer a question.

    Attributes:
        table: rows with the columns of ``RANKED``.
        similar: id -> relevance, 0..1.
    """

    question: Question
    table: pa.Table
    similar: dict[str, float]


def related(
    store: MemoryStore, query: NDArray[np.float32], text: str, *, where: Filter, top_k: int
) -> Answers:
    """Return the memories that answer ``text`` best: near it, with its words, or beside those."""
    return _again(store, lambda: _related(store, query, text, where=where, top_k=top_k))


def _related(
    store: MemoryStore, query: NDArray[np.float32], text: str, *, where: Filter, top_k: int
) -> Answers:
    question = Question(store, text, query)
    conditions = condition_columns(where)
    columns = list(dict.fromkeys([*RANKED, *question.columns, *conditions]))
    asked = min(MAX_TOP_K, max(_LEAST, SPARE * top_k))
    asks = [_by_vector(store, query, asked, columns)]
    if question.asked:
        asks.append(_by_words(store, text, min(MAX_TOP_K, max(_LEAST, 2 * top_k)), columns))
    table = _once(pa.concat_tables([part.select(columns) for part in _living(store, asks, where)]))
    if not table.num_rows:
        return Answers(question, table, {})
    own = question.scores(table)
    ids = table["_rowid"].to_numpy()
    first = ids[np.argsort(-own, kind="stable")[: max(_LEAST // 4, top_k)]]
    beside = set(neighbours(question, first.tolist())) - set(ids.tolist())
    if beside:
        more = store.fetch(store.take(sorted(beside)).select(columns).with_row_id())
        more = more.select(columns).filter(passing(more, where, utc(store.clock())))
        # A row that moved since is there already, under its new row id.
        new = pc.invert(pc.is_in(more["memory_id"], table["memory_id"].combine_chunks()))
        more = more.filter(new)
        table = pa.concat_tables([table, more])
        own = np.concatenate([own, question.scores(more)])
    values = question.relevance(table, own)
    similar = dict(zip(table["memory_id"].to_pylist(), values.tolist(), strict=True))
    return Answers(question, table.select(RANKED), similar)


def condition_columns(where: Filter) -> list[str]:
    """Return the columns a filter looks at, beside the id."""
    conditions = {
        "timestamp": where.since or where.until,
        "category": where.categories,
        "tier": where.tiers,
        f"has_{where.modality}": where.modality,
    }
    return [name for name, condition in conditions.items() if condition]


def passing(table: pa.Table, where: Filter, now: datetime) -> pa.Array:
    """Say which rows pass the filter and have not expired, bool (n,).

    Args:
        table: with ``memory_id``, ``expires_at`` and :func:`condition_columns`.
    """
    names = ["memory_id", "expires_at", *condition_columns(where)]
    kept = [
        (row["expires_at"] is None or row["expires_at"] > now)
        and (not where.ids or row["memory_id"] in where.ids)
        and (where.since is None or row["timestamp"] >= utc(where.since))
        and (where.until is None or row["timestamp"] < utc(where.until))
        and (not where.categories or row["category"] in where.categories)
        and (not where.tiers or row["tier"] in where.tiers)
        and (where.modality is None or row[f"has_{where.modality}"])
        for row in table.select(names).to_pylist()
    ]
    return pa.array(kept, pa.bool_())


def _once(table: pa.Table) -> pa.Table:
    """Return the first row of each memory."""
    ids = table["memory_id"].to_pylist()
    first = {key: at for at, key in reversed(list(enumerate(ids)))}
    return table.take(pa.array(sorted(first.values()), pa.int64()))


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


@dataclass(frozen=True, slots=True)
class _Ask:
    """A search: its queries for a number of rows, what they are ranked by, what is read of them.

    ``deep`` says how many rows to look at for a number of rows, and ``rank`` ranks them.
    """

    build: Callable[[int], list[Any]]
    top_k: int
    score: str
    columns: Sequence[str] | None
    deep: Callable[[int], int] = int
    rank: Callable[[pa.Table], pa.Table] = lambda found: found


def _by_vector(
    store: MemoryStore,
    query: NDArray[np.float32],
    top_k: int,
    columns: Sequence[str] | None = None,
) -> _Ask:
    if store.compact:
        return _by_signs(store, query, top_k, columns)
    # Who asks for more than it needs, with their vectors, compares them itself.
    spare = SPARE if columns and "joint_embedding" in columns else 1

    def build(count: int) -> list[Any]:
        search = store.query().nearest_to(query).column("joint_embedding").distance_type("cosine")
        return [store.index.tune(search, count, spare)]

    return _Ask(build, top_k, "_distance", columns)


def _by_signs(
    store: MemoryStore, query: NDArray[np.float32], top_k: int, columns: Sequence[str] | None
) -> _Ask:
    """Search the vectors of a compact store: by their signs, then the nearest by all their bits."""
    if columns is not None:
        columns = list(dict.fromkeys([*columns, "joint_embedding"]))

    def build(count: int) -> list[Any]:
        bits = compact.signs(query[None])[0]
        return [store.query().nearest_to(bits).column(BITS).distance_type("hamming")]

    def rank(found: pa.Table) -> pa.Table:
        distances = 1 - rows.vectors_array(found["joint_embedding"], store.dim) @ query
        order = np.argsort(distances, kind="stable")
        at = found.column_names.index("_distance")
        found = found.set_column(at, "_distance", pa.array(distances.astype(np.float32)))
        return found.take(pa.array(order))

    return _Ask(build, top_k, "_distance", columns, compact.candidates, rank)


def _by_words(
    store: MemoryStore, text: str, top_k: int, columns: Sequence[str] | None = None
) -> _Ask:
    from lancedb.query import MatchQuery

    asked = " ".join(query_words(text))

    def build(count: int) -> list[Any]:
        # A match query takes the words as they are: there is no query language to break out of.
        # One query per column, since Lance stops early only in those: 2 ms instead of 15 ms.
        return [
            store.query().nearest_to_text(
                MatchQuery(asked if column == WORDS.name else text, column)
            )
            for column in store.word_columns
        ]

    return _Ask(build, top_k, "_score", columns)


def _living(store: MemoryStore, asks: Sequence[_Ask], where: Filter) -> list[pa.Table]:
    """Run searches at the same time, and leave out what has expired and is not erased yet.

    Done after the search: expired rows are few, and a filter would cost every query a scan. Without
    ``columns`` all that hold something in the rows found are read.
    """
    now = utc(store.clock())
    condition = expression(where)
    counts = [ask.top_k for ask in asks]
    done: dict[int, pa.Table] = {}
    while len(done) < len(asks):
        queries: list[Any] = []
        parts: dict[int, slice] = {}
        for at, (ask, count) in enumerate(zip(asks, counts, strict=True)):
            if at in done:
                continue
            names = [*(ask.columns or [*ALWAYS, *sorted(store.wanted_columns)]), ask.score]
            built = ask.build(count)
            parts[at] = slice(len(queries), len(queries) + len(built))
            queries += [
                (search if condition is None else search.where(condition))
                .select(names)
                .limit(ask.deep(count))
                for search in built
            ]
        tables = store.fetch_all(queries)
        for at, part in parts.items():
            ask = asks[at]
            found = ask.rank(_best(tables[part], ask.score, ask.deep(counts[at])))
            found = found.slice(0, counts[at])
            missing = set() if ask.columns else needed_columns(found) - store.wanted_columns
            if missing:
                # The first row that uses a column is met: it is read from now on. One query sees
                # one version, so the search is repeated rather than completed.
                store.wanted_columns |= missing
                continue
            alive = [moment is None or moment > now for moment in found["expires_at"].to_pylist()]
            if sum(alive) >= ask.top_k or found.num_rows < counts[at]:
                done[at] = found.filter(pa.array(alive, pa.bool_())).slice(0, ask.top_k)
            else:
                counts[at] *= 2
    return [done[at] for at in range(len(asks))]


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


def _hits(store: MemoryStore, found: pa.Table, scores: NDArray[Any], top_k: int) -> list[Hit]:
    opened = store.unpack(found)
    memories = rows.memories(opened, store.dim, extra_accesses=store.pending_touches())
    hits = [Hit(memory, float(score)) for memory, score in zip(memories, scores, strict=True)]
    hits.sort(key=lambda hit: (-hit.score, hit.memory.memory_id))
    return hits[:top_k]
