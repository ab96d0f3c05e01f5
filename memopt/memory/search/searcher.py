"""Search by vector, by words, and by both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from memopt.errors import ConsolidationError, InputError
from memopt.memory.model import rows, signs
from memopt.memory.model.content import check_text
from memopt.memory.model.filters import columns_of, expression, passing, unexpired
from memopt.memory.model.schema import BITS, WORDS, Filter, Hit
from memopt.memory.model.words import query_words
from memopt.memory.search.relevance import Question, neighbours
from memopt.memory.search.surroundings import SurroundingsCache
from memopt.memory.search.used_columns import UsedColumns
from memopt.memory.search.vector_index import VectorIndex
from memopt.memory.store.embedding import Embedding
from memopt.memory.store.reader import Reader

_T = TypeVar("_T")
MAX_TOP_K = 10_000
# Rows looked at for a question, so that what is second in both can win.
_LEAST = 40
# Searches run at the same time: enough for every core, few enough that others get their turn.
_AT_ONCE = 16
# Rows that :meth:`Searcher.nearest` returns for each that is asked for.
SPARE = 4
_ID_ONLY = ("memory_id", "expires_at")
# What it takes to rank rows and to read the best of them afterwards.
RANKED = ("memory_id", "expires_at", "joint_embedding", "_rowid")


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What may answer a question.

    Attributes:
        question: None where only a vector was asked.
        query: float32 (dim,), of length 1.
        table: rows with the columns of ``RANKED``.
        similar: id -> relevance, or cosine similarity, 0..1.
    """

    question: Question | None
    query: NDArray[np.float32]
    table: pa.Table
    similar: dict[str, float]

    def similarity(self, table: pa.Table) -> dict[str, float]:
        """Return id -> what ``similar`` says, of rows that came in later."""
        if self.question is None:
            return cosines(table, self.query)
        return _scores(table, self.question.alone(table))


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


class Searcher:
    """Searches the memories of one database.

    Attributes:
        columns: what is read of rows that are found.
    """

    def __init__(self, reader: Reader, embedding: Embedding, index: VectorIndex) -> None:
        self._database, self._cells = reader.database, reader.cells
        self._reader, self._embedding, self._index = reader, embedding, index
        self._surroundings = SurroundingsCache(reader.cells)
        self.columns = UsedColumns()

    # --- what is asked ----------------------------------------------------------------------

    def search(
        self,
        vector: NDArray[Any] | Sequence[float] | None,
        *,
        text: str | None,
        where: Filter,
        top_k: int,
    ) -> list[Hit]:
        """Find memories; see :meth:`MemoryStore.search`. The accesses are not counted."""
        check_top_k(top_k)
        if text is not None:
            check_text(text, "query")
            text = text if text.strip() else None
        if vector is None and text is None:
            raise InputError("the query is empty", fix="give a vector or some words")
        query = None if vector is None else self._embedding.query(vector)
        if text is not None and self._database.cipher is not None:
            if query is None:
                raise ConsolidationError(
                    "an encrypted store has no word index", fix="search by meaning, with a vector"
                )
            text = None
        if query is None:
            return self._again(lambda: self._by_words_alone(text or "", where, top_k))
        if text is None:
            return self._again(lambda: self._by_vector_alone(query, where, top_k))
        return self._again(lambda: self._by_both(query, text, where, top_k))

    def candidates(
        self, vectors: Sequence[NDArray[Any] | Sequence[float]], *, where: Filter, top_k: int
    ) -> list[list[tuple[str, float]]]:
        """Return (id, cosine similarity) for each of several vectors, best first."""
        check_top_k(top_k)
        return self._again(lambda: self._candidates(vectors, where, top_k))

    def nearest(self, query: NDArray[np.float32], *, where: Filter, top_k: int) -> Answers:
        """Return rows near the query, the ``top_k`` nearest among them, by their vectors.

        Args:
            query: float32 (dim,), of length 1.
        """

        def run() -> pa.Table:
            # By rough distances; the best are found by their vectors.
            (found,) = self._living([self._vector_ask(query, SPARE * top_k, RANKED)], where)
            return found.select(RANKED)

        table = self._again(run)
        return Answers(None, query, table, cosines(table, query))

    def related(
        self, query: NDArray[np.float32], text: str, *, where: Filter, top_k: int
    ) -> Answers:
        """Return the memories that answer ``text`` best: near, with its words, or beside those."""
        return self._again(lambda: self._related(query, text, where, top_k))

    # --- rows that were found ---------------------------------------------------------------

    def whole(self, row_ids: Mapping[str, int]) -> pa.Table:
        """Return what holds something of rows (id -> row id) just found, from where they were."""
        found = self._reader.by_row_id(row_ids, self.columns.names()) if row_ids else None
        if found is None or self.columns.lacks(found):
            return self._reader.rows(list(row_ids))
        return found

    def _hits(self, found: pa.Table, scores: Mapping[str, float], top_k: int) -> list[Hit]:
        hits = [Hit(one, scores[one.memory_id]) for one in self._reader.records(found)]
        hits.sort(key=lambda hit: (-hit.score, hit.memory.memory_id))
        return hits[:top_k]

    # --- the kinds of search ----------------------------------------------------------------

    def _by_vector_alone(self, query: NDArray[np.float32], where: Filter, top_k: int) -> list[Hit]:
        # Of a compact store many more rows are compared than found: these are read afterwards.
        compact = self._database.compact
        ask = self._vector_ask(query, top_k, _ID_ONLY if compact else None)
        (found,) = self._living([ask], where)
        near = _scores(found, 1 - found["_distance"].to_numpy())
        return self._hits(self._reader.rows(list(near)) if compact else found, near, top_k)

    def _by_words_alone(self, text: str, where: Filter, top_k: int) -> list[Hit]:
        (found,) = self._living([self._words_ask(text, top_k)], where)
        scores = found["_score"].to_numpy()
        best = max(scores.max(initial=0), 1e-9)
        return self._hits(found, _scores(found, scores / best), top_k)

    def _by_both(
        self, query: NDArray[np.float32], text: str, where: Filter, top_k: int
    ) -> list[Hit]:
        answers = self._related(query, text, where, top_k)
        best = sorted(answers.similar, key=lambda key: (-answers.similar[key], key))[:top_k]
        row_ids = row_ids_of(answers.table)
        found = self.whole({key: row_ids[key] for key in best})
        return self._hits(found, answers.similar, top_k)

    def _candidates(
        self, vectors: Sequence[NDArray[Any] | Sequence[float]], where: Filter, top_k: int
    ) -> list[list[tuple[str, float]]]:
        found: list[list[tuple[str, float]]] = []
        for part in rows.chunks(vectors, _AT_ONCE):
            queries = [self._embedding.query(vector) for vector in part]
            asks = [self._vector_ask(query, top_k, _ID_ONLY) for query in queries]
            for table in self._living(asks, where):
                found.append(list(_scores(table, 1 - table["_distance"].to_numpy()).items()))
        return found

    def _related(self, query: NDArray[np.float32], text: str, where: Filter, top_k: int) -> Answers:
        question = Question(
            self._surroundings.current(),
            text,
            query,
            plain=self._database.cipher is None,
            worded=self._cells.has_word_index,
        )
        columns = list(dict.fromkeys([*RANKED, *question.columns, *columns_of(where)]))
        asks = [self._vector_ask(query, min(MAX_TOP_K, max(_LEAST, SPARE * top_k)), columns)]
        if question.asked:
            most = min(MAX_TOP_K, max(_LEAST, 2 * top_k))
            asks.append(self._words_ask(text, most, columns))
        parts = [part.select(columns) for part in self._living(asks, where)]
        table = _first_of_each(pa.concat_tables(parts))
        if not table.num_rows:
            return Answers(question, query, table, {})
        own = question.scores(table)
        ids = table["_rowid"].to_numpy()
        first = ids[np.argsort(-own, kind="stable")[: max(_LEAST // 4, top_k)]]
        beside = set(neighbours(question, first.tolist())) - set(ids.tolist())
        if beside:
            database = self._database
            more = database.fetch(database.take(sorted(beside)).select(columns).with_row_id())
            more = more.select(columns).filter(passing(more, where, database.now()))
            # A row that moved since is there already, under its new row id.
            new = pc.invert(pc.is_in(more["memory_id"], table["memory_id"].combine_chunks()))
            more = more.filter(new)
            table = pa.concat_tables([table, more])
            own = np.concatenate([own, question.scores(more)])
        similar = _scores(table, question.relevance(table, own))
        return Answers(question, query, table.select(RANKED), similar)

    # --- queries ----------------------------------------------------------------------------

    def _vector_ask(
        self, query: NDArray[np.float32], top_k: int, columns: Sequence[str] | None
    ) -> _Ask:
        if self._database.compact:
            return self._signs_ask(query, top_k, columns)
        # Who asks for more than it needs, with their vectors, compares them itself.
        spare = SPARE if columns and "joint_embedding" in columns else 1

        def build(count: int) -> list[Any]:
            search = self._database.query().nearest_to(query).column("joint_embedding")
            return [self._index.tune(search.distance_type("cosine"), count, spare)]

        return _Ask(build, top_k, "_distance", columns)

    def _signs_ask(
        self, query: NDArray[np.float32], top_k: int, columns: Sequence[str] | None
    ) -> _Ask:
        """Search the vectors of a compact store: by their signs, then the nearest by all bits."""
        if columns is not None:
            columns = list(dict.fromkeys([*columns, "joint_embedding"]))

        def build(count: int) -> list[Any]:
            bits = signs.signs(query[None])[0]
            return [self._database.query().nearest_to(bits).column(BITS).distance_type("hamming")]

        def rank(found: pa.Table) -> pa.Table:
            distances = 1 - rows.vectors_array(found["joint_embedding"], len(query)) @ query
            at = found.column_names.index("_distance")
            found = found.set_column(at, "_distance", pa.array(distances.astype(np.float32)))
            return found.take(pa.array(np.argsort(distances, kind="stable")))

        return _Ask(build, top_k, "_distance", columns, signs.candidates, rank)

    def _words_ask(self, text: str, top_k: int, columns: Sequence[str] | None = None) -> _Ask:
        from lancedb.query import MatchQuery

        asked = " ".join(query_words(text))

        def build(count: int) -> list[Any]:
            # A match query takes the words as they are: there is no query language to break out of.
            # One query per column, since Lance stops early only in those: 2 ms instead of 15 ms.
            return [
                self._database.query().nearest_to_text(
                    MatchQuery(asked if column == WORDS.name else text, column)
                )
                for column in self._cells.word_columns
            ]

        return _Ask(build, top_k, "_score", columns)

    def _living(self, asks: Sequence[_Ask], where: Filter) -> list[pa.Table]:
        """Run searches at the same time, and leave out what has expired and is not erased yet.

        Done after the search: expired rows are few, and a filter would cost every query a scan.
        Without ``columns`` all that hold something in the rows found are read.
        """
        now, condition = self._database.now(), expression(where)
        counts = [ask.top_k for ask in asks]
        done: dict[int, pa.Table] = {}
        while len(done) < len(asks):
            queries: list[Any] = []
            parts: dict[int, slice] = {}
            for at, (ask, count) in enumerate(zip(asks, counts, strict=True)):
                if at in done:
                    continue
                names = [*(ask.columns or self.columns.names()), ask.score]
                built = ask.build(count)
                parts[at] = slice(len(queries), len(queries) + len(built))
                queries += [
                    (search if condition is None else search.where(condition))
                    .select(names)
                    .limit(ask.deep(count))
                    for search in built
                ]
            tables = self._database.fetch_all(queries)
            for at, part in parts.items():
                ask = asks[at]
                found = ask.rank(_best(tables[part], ask.score, ask.deep(counts[at])))
                found = found.slice(0, counts[at])
                if not ask.columns and self.columns.lacks(found):
                    # The first row that uses a column is met: it is read from now on. One query
                    # sees one version, so the search is repeated rather than completed.
                    continue
                alive = found.filter(unexpired(found["expires_at"], now))
                if alive.num_rows >= ask.top_k or found.num_rows < counts[at]:
                    done[at] = alive.slice(0, ask.top_k)
                else:
                    counts[at] *= 2
        return [done[at] for at in range(len(asks))]

    def _again(self, run: Callable[[], _T]) -> _T:
        """Search once more where the vectors were made compact, or plain again, meanwhile."""
        database = self._database
        try:
            return run()
        except ConsolidationError:
            if database.place.local is None:
                raise
            before = database.compact
            # Waits until the indices are there as well.
            with suppress(ConsolidationError), database.exclusive():
                database.look_again()
            if database.compact == before:
                raise
            return run()


def check_top_k(top_k: int) -> None:
    """Refuse a number of results that makes no sense.

    Raises:
        InputError: it is not between 1 and MAX_TOP_K.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
        raise InputError(f"top_k is {top_k!r}", fix=f"give a whole number from 1 to {MAX_TOP_K}")


def row_ids_of(table: pa.Table) -> dict[str, int]:
    """Return id -> row id of rows just found."""
    return dict(zip(table["memory_id"].to_pylist(), table["_rowid"].to_pylist(), strict=True))


def cosines(table: pa.Table, query: NDArray[np.float32]) -> dict[str, float]:
    """Return id -> cosine similarity of rows to a query, 0..1."""
    return _scores(table, rows.vectors_array(table["joint_embedding"], len(query)) @ query)


def _scores(table: pa.Table, values: NDArray[Any]) -> dict[str, float]:
    return dict(zip(table["memory_id"].to_pylist(), np.clip(values, 0, 1).tolist(), strict=True))


def _first_of_each(table: pa.Table) -> pa.Table:
    """Return the first row of each memory."""
    ids = table["memory_id"].to_pylist()
    first = {key: at for at, key in reversed(list(enumerate(ids)))}
    return table.take(pa.array(sorted(first.values()), pa.int64()))


def _best(tables: list[pa.Table], score: str, count: int) -> pa.Table:
    """Join the answers of several columns; a memory that several found keeps its best score."""
    if len(tables) == 1:
        return tables[0]
    joined = pa.concat_tables(tables).sort_by([(score, "descending"), ("memory_id", "ascending")])
    return _first_of_each(joined).slice(0, count)
