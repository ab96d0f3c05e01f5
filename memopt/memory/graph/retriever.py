"""Retrieval from words, pictures and sounds: the nearest vectors and what they remind of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from memopt.errors import InputError
from memopt.memory.graph.association import AssociationGraph
from memopt.memory.graph.spreading import Activation, spread
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.content import check_content
from memopt.memory.model.filters import columns_of, passing
from memopt.memory.model.schema import Content, Filter, Memory
from memopt.memory.search.searcher import RANKED, SPARE, Answers, check_top_k, row_ids_of

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
    >>> import numpy as np
    >>> from memopt.memory import AssociationGraph, MemoryStore, NewMemory
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
        alpha, beta = _weights(alpha, beta, text)
        where = where or Filter()
        content = Content(text=text, vision=vision, audio=audio)
        answers = self._answers(content, vector, where, top_k)
        activation = self._activation(answers.similar) if enable_association else None
        if activation is None:
            alpha, beta = 1.0, 0.0
        ranking = _Ranking(alpha, beta, top_k, dict(answers.similar), row_ids_of(answers.table))
        early = self._associate(ranking, activation, answers, where) if activation else None
        best = ranking.best()
        memories = self._memories({key: ranking.row_ids[key] for _, key in best}, early)
        found = [
            Retrieved(memories[key], ranking.similar[key], ranking.reached.get(key, 0.0), score)
            for score, key in best
            if key in memories
        ]
        if touch and found:
            self._count([result.memory.memory_id for result in found])
        return found

    def _answers(
        self, content: Content, vector: NDArray[Any] | None, where: Filter, top_k: int
    ) -> Answers:
        """Return what is near the content, or the vector, or answers its text."""
        embedding, searcher = self.store.embedding, self.store.searcher
        if vector is None or content.modalities:
            check_content(content, "query")
        query = embedding.embed([content])[0] if vector is None else embedding.query(vector)
        if content.text and content.text.strip():
            return searcher.related(query, content.text, where=where, top_k=top_k)
        return searcher.nearest(query, where=where, top_k=top_k)

    def _activation(self, similar: Mapping[str, float]) -> Activation | None:
        """Return what the similar ones remind of; None where it is nothing."""
        if self.graph is None or not similar:
            return None
        now, graph = self.store.database.now(), self.graph
        found = spread(similar, graph.links.network(), lambda w, when: graph.faded(w, when, now))
        return found if len(found.nodes) else None

    def _associate(
        self, ranking: _Ranking, activation: Activation, answers: Answers, where: Filter
    ) -> pa.Table | None:
        """Rank what is associated too; return the rows of the first so far, read on the way.

        Association seldom changes all of the first: they are read while it is looked at.
        """
        store, ids = self.store, list(ranking.similar)
        ranking.reached.update(zip(ids, activation.of(ids), strict=True))
        associated = ranking.worth_reading(activation)
        # Where most have moved from where the links saw them, the links are read anew.
        seen = activation.network.row_ids(list(associated))
        columns = [*RANKED, *(answers.question.columns if answers.question else ())]
        table, early, moved = store.reader.light_and_rows(
            [key for key in associated if not where.ids or key in where.ids],
            seen,
            list(dict.fromkeys([*columns, *columns_of(where)])),
            {key: ranking.row_ids[key] for _, key in ranking.best()},
            store.searcher.columns.names(),
        )
        if moved > len(seen) // 2:
            store.link_cache.refresh()
        table = table.select(columns).filter(passing(table, where, store.database.now()))
        ranking.similar |= answers.similarity(table)
        ranking.reached |= associated
        ranking.row_ids |= row_ids_of(table)
        return early

    def _memories(self, row_ids: Mapping[str, int], early: pa.Table | None) -> dict[str, Memory]:
        """Return the memories of rows just ranked, of which some were read ``early``.

        One that was deleted meanwhile is left out.
        """
        store, rest = self.store, dict(row_ids)
        memories: list[Memory] = []
        if early is not None and not store.searcher.columns.lacks(early):
            ids = pa.array(list(row_ids), pa.string())
            memories = store.reader.records(early.filter(pc.is_in(early["memory_id"], ids)))
            for memory in memories:
                del rest[memory.memory_id]
        if rest:
            memories += store.reader.records(store.searcher.whole(rest))
        found = {memory.memory_id: memory for memory in memories}
        store.database.observers.accessed("read", [key for key in row_ids if key in found])
        return found

    def _count(self, ids: list[str]) -> None:
        self.store.touch(ids)
        if self.graph is not None:
            self.graph.retrieved(ids)


@dataclass(slots=True)
class _Ranking:
    """Weighs similarity (``similar``) and activation (``reached``) of memories by id."""

    alpha: float
    beta: float
    top_k: int
    similar: dict[str, float]
    row_ids: dict[str, int]
    reached: dict[str, float] = field(default_factory=dict)

    def best(self) -> list[tuple[float, str]]:
        """Return (score, id) of the first ``top_k``, best first, equal ones by id."""
        weight = self.alpha + self.beta
        scores = [(-self._sum(key) / weight, key) for key in self.similar]
        return [(-score, key) for score, key in sorted(scores)[: self.top_k]]

    def worth_reading(self, activation: Activation) -> dict[str, float]:
        """Return the associated memories that could still get among the first, strongest first.

        The threshold algorithm (Fagin, Lotem & Naor 2001): what was not found by similarity is less
        similar than the last result, so with too little activation it cannot pass the ``top_k``-th.
        """
        full = len(self.similar) >= SPARE * self.top_k
        below = min(self.similar.values()) if full else 1.0
        known = sorted((self._sum(key) for key in self.similar), reverse=True)
        needed = known[self.top_k - 1] if len(known) >= self.top_k else 0.0
        missing = needed - self.alpha * below - _ROUNDING
        if missing > self.beta:
            return {}
        strong = activation.above(missing / self.beta if self.beta else 0.0)
        new = [(-value, key) for key, value in strong.items() if key not in self.similar]
        return {key: -value for value, key in sorted(new)[:_MOST_READ]}

    def _sum(self, key: str) -> float:
        return self.alpha * self.similar[key] + self.beta * self.reached.get(key, 0.0)


def _weights(alpha: float, beta: float | None, text: str | None) -> tuple[float, float]:
    if beta is None:
        beta = _BETA_OF_TEXT if text and text.strip() else _BETA
    if alpha < 0 or beta < 0 or alpha + beta == 0:
        raise InputError(
            f"alpha {alpha} and beta {beta} weigh nothing", fix="use 0.7 and 0.3, not negative"
        )
    return alpha, beta
