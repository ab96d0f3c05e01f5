"""Retrieval from words, pictures and sounds: the nearest vectors and what they remind of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from memopt.errors import ConsolidationError, InputError
from memopt.memory.graph.spreading import Activation, spread
from memopt.memory.model import rows
from memopt.memory.model.content import check_content
from memopt.memory.model.filters import utc
from memopt.memory.model.schema import Content, Filter, Memory
from memopt.memory.search import searcher as searching
from memopt.memory.search.searcher import check_top_k
from memopt.memory.store import reader as reading

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from memopt.memory.graph.association import AssociationGraph
    from memopt.memory.memory_store import MemoryStore
    from memopt.memory.search.relevance import Question

# Weight of the association beside 0.7 of the similarity. That of a text knows what was said around
# it already: on long conversations 0.3 costs recall there, 0.1 does not.
_BETA, _BETA_OF_TEXT = 0.3, 0.1
# Associated memories looked at, the strongest; those that cannot win are left out before.
_MOST_READ = 32
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Retrieved:
    """One result; the three scores are in 0..1.

    Attributes:
        similarity: cosine similarity to the query, 0 where it is negative; to a text, its words and
            what is said around it count as well (:mod:`memopt.memory.search.relevance`).
        association_score: activation that reached it over the graph, 1 for the most activated.
        final_score: (alpha x similarity + beta x association_score) / (alpha + beta).
    """

    memory: Memory
    similarity: float
    association_score: float
    final_score: float


class MultimodalRetriever:
    """Finds memories from a text, a picture, a sound or any of them together.

    Args:
        store: where to look; needs an embedder, or queries that bring their vector.
        graph: the store's association graph; without one nothing is associated.

    >>> import tempfile
    >>> from memopt.memory.graph.association import AssociationGraph
    >>> from memopt.memory.model.schema import NewMemory
    >>> from memopt.memory.memory_store import MemoryStore
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> graph = AssociationGraph(store)
    >>> rows = [("a red door", [1, 0]), ("its key", [0, 1])]
    >>> _ = store.add([NewMemory(content=Content(text=text), embedding=np.array(vector))
    ...                for text, vector in rows])
    >>> found = MultimodalRetriever(store, graph).retrieve(vector=np.array([1.0, 0.0]))
    >>> [(r.memory.text, round(r.final_score, 2)) for r in found]
    [('a red door', 0.85), ('its key', 0.3)]
    """

    def __init__(self, store: MemoryStore, graph: AssociationGraph | None = None) -> None:
        self.store = store
        self.graph = graph

    def retrieve(
        self,
        text: str | None = None,
        vision: bytes | None = None,
        audio: bytes | None = None,
        *,
        vector: NDArray[Any] | None = None,
        top_k: int = 10,
        enable_association: bool = True,
        alpha: float = 0.7,
        beta: float | None = None,
        where: Filter | None = None,
        touch: bool = True,
    ) -> list[Retrieved]:
        """Return the best memories, best first.

        Args:
            text: words; the nearest by meaning and, in a plain store, those with the words in them.
            vision: bytes of an image.
            audio: bytes of a sound.
            vector: (dim,), instead of embedding the content.
            top_k: how many at most.
            enable_association: follow the graph; it may bring in what is not near by itself.
            alpha: weight of the similarity.
            beta: weight of the association; by default 0.3, and 0.1 where there is a text, whose
                similarity knows what was said around it.
            where: only these; association does not lead out of them.
            touch: count the results as accessed and as recalled together.

        Raises:
            InputError: no query, top_k below 1, a negative weight, or content that cannot be read.
        """
        check_top_k(top_k)
        worded = bool(text and text.strip())
        if beta is None:
            beta = _BETA_OF_TEXT if worded else _BETA
        if alpha < 0 or beta < 0 or alpha + beta == 0:
            raise InputError(
                f"alpha {alpha} and beta {beta} weigh nothing", fix="use 0.7 and 0.3, not negative"
            )
        content = Content(text=text, vision=vision, audio=audio)
        if vector is None or content.modalities:
            check_content(content, "query")
        query = (
            self.store.embed([content])[0]
            if vector is None
            else searching.query_vector(self.store, vector)
        )
        where = where or Filter()
        asked = searching.SPARE * top_k
        question = None
        if text and worded:
            answers = searching.related(self.store, query, text, where=where, top_k=top_k)
            question, similar, tables = answers.question, answers.similar, [answers.table]
        else:
            tables = [searching.nearest(self.store, query, where=where, top_k=asked)]
            similar = self._similarity(tables[0], query, None)
        # Whatever the search did not return is less similar than its last result.
        below = min(similar.values()) if len(similar) >= asked else 1.0
        activation = self._activation(similar) if enable_association else None
        if activation is None:
            alpha, beta = 1.0, 0.0
        reached = dict.fromkeys(similar, 0.0)
        new: dict[str, float] = {}
        if activation is not None:
            reached = dict(zip(similar, activation.of(list(similar)), strict=True))
            new = _worth_reading(similar, reached, activation, below, alpha, beta, top_k)

        def best() -> list[tuple[float, str]]:
            scores = [
                (-(alpha * value + beta * reached[key]) / (alpha + beta), key)
                for key, value in similar.items()
            ]
            return sorted(scores)[:top_k]

        # Association seldom changes all of the first: they are read while it is looked at.
        likely = self._row_ids(tables, [key for _, key in best()])
        seen = activation.network.row_ids(list(new)) if activation is not None else {}
        associated, early = self._read(list(new), seen, where, likely, question)
        tables.append(associated)
        similar |= self._similarity(associated, query, question)
        reached |= new
        ranked = best()
        memories = self._memories(self._row_ids(tables, [key for _, key in ranked]), early)
        found = [
            Retrieved(memories[key], similar[key], reached[key], -score)
            for score, key in ranked
            if key in memories
        ]
        if touch and found:
            ids = [result.memory.memory_id for result in found]
            self.store.touch(ids)
            if self.graph is not None:
                self.graph.retrieved(ids)
        return found

    def _similarity(
        self, table: pa.Table, query: NDArray[np.float32], question: Question | None
    ) -> dict[str, float]:
        if question is None:
            vectors = rows.vectors_array(table["joint_embedding"], self.store.dim)
            values = np.clip(vectors @ query, 0, 1)
        else:
            values = question.alone(table)
        return dict(zip(table["memory_id"].to_pylist(), values.tolist(), strict=True))

    def _read(
        self,
        ids: Sequence[str],
        seen: Mapping[str, int],
        where: Filter,
        likely: Mapping[str, int],
        question: Question | None,
    ) -> tuple[pa.Table, pa.Table | None]:
        """Return what ranks those of ``ids`` that the filter lets pass, and the ``likely`` rows.

        ``seen`` are row ids that some of ``ids`` had; where most are wrong, all are read anew.
        """
        if where.ids:
            ids = [key for key in ids if key in where.ids]
        columns = [*searching.RANKED, *(question.columns if question else ())]
        names = list(dict.fromkeys([*columns, *searching.condition_columns(where)]))
        table, early, moved = reading.light_and_rows(
            self.store, ids, seen, names, likely, self._columns()
        )
        if moved > len(seen) // 2:
            self.store.adjacency.refresh()
        kept = searching.passing(table, where, utc(self.store.clock()))
        return table.select(columns).filter(kept), early

    def _columns(self) -> list[str]:
        return [*searching.ALWAYS, *sorted(self.store.wanted_columns)]

    def _row_ids(self, tables: Sequence[pa.Table], ids: Sequence[str]) -> dict[str, int]:
        at: dict[str, int] = {}
        for table in tables:
            names = table["memory_id"].to_pylist()
            at.update(zip(names, table["_rowid"].to_pylist(), strict=True))
        return {key: at[key] for key in ids}

    def _activation(self, similar: Mapping[str, float]) -> Activation | None:
        """Return what the similar ones remind of; None where it is nothing."""
        if self.graph is None or not similar:
            return None
        now = utc(self.store.clock())
        graph = self.graph
        found = spread(similar, graph.network(), lambda w, when: graph.faded(w, when, now))
        return found if len(found.nodes) else None

    def _memories(self, row_ids: Mapping[str, int], early: pa.Table | None) -> dict[str, Memory]:
        read = set(early["memory_id"].to_pylist()) if early is not None else set()
        rest = {key: at for key, at in row_ids.items() if key not in read}
        late = reading.by_row_id(self.store, rest, self._columns()) if rest else None
        parts = [part for part in (early, late) if part is not None]
        table = pa.concat_tables(parts) if parts else None
        needed = set() if table is None else searching.needed_columns(table)
        if table is None or (rest and late is None) or needed - set(table.column_names):
            # The next retrieval reads them at once.
            self.store.wanted_columns |= needed
            memories = self._whole(list(row_ids))
        else:
            names = table["memory_id"].to_pylist()
            wanted = pa.array([key in row_ids for key in names], pa.bool_())
            memories = rows.memories(
                self.store.unpack(table.filter(wanted)),
                self.store.dim,
                extra_accesses=self.store.pending_touches(),
            )
            self.store.observe("read", list(row_ids))
        return {memory.memory_id: memory for memory in memories}

    def _whole(self, ids: list[str]) -> list[Memory]:
        try:
            return self.store.get_many(ids, links=False)
        except InputError:
            # One was deleted or expired between the two reads; the others are still answers.
            found = []
            for key in ids:
                try:
                    found.append(self.store.get(key, links=False))
                except (InputError, ConsolidationError):
                    continue
            return found


def _worth_reading(
    similar: Mapping[str, float],
    reached: Mapping[str, float],
    activation: Activation,
    below: float,
    alpha: float,
    beta: float,
    top_k: int,
) -> dict[str, float]:
    """Return the associated memories that could still get among the first, strongest first.

    The threshold algorithm (Fagin, Lotem & Naor 2001): what was not found by similarity is at most
    ``below`` similar, so with too little activation it cannot pass the ``top_k``-th result.
    """
    known = [alpha * value + beta * reached[key] for key, value in similar.items()]
    needed = sorted(known, reverse=True)[top_k - 1] if len(known) >= top_k else 0.0
    missing = needed - alpha * below - _ROUNDING
    if missing > beta:
        return {}
    strong = activation.above(missing / beta if beta else 0.0)
    new = [(-value, key) for key, value in strong.items() if key not in similar]
    return {key: -value for value, key in sorted(new)[:_MOST_READ]}
