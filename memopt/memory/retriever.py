"""Retrieval from words, pictures and sounds: the nearest vectors and what they remind of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import ConsolidationError, InputError
from memopt.memory.incoming import check_content
from memopt.memory.schema import Content, Filter, Memory
from memopt.memory.searching import check_top_k

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from memopt.memory.graph import AssociationGraph
    from memopt.memory.store import MemoryStore

# Candidates per result: what association lifts must be among them or within reach of them.
_DEPTH = 4
# Activation passed on per link, and how far it goes: Collins & Loftus 1975; two hops and a decay of
# 0.5 are in the range Crestani 1997 reports as useful, beyond it everything is lit.
_HOPS = 2
_PASSED_ON = 0.5
# Memories whose links are followed per hop: the strongest, so that a query stays milliseconds.
_FRONTIER = 64


@dataclass(frozen=True, slots=True)
class Retrieved:
    """One result; the three scores are in 0..1.

    Attributes:
        similarity: cosine similarity to the query, 0 where it is negative.
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
    >>> from memopt.memory.graph import AssociationGraph
    >>> from memopt.memory.schema import NewMemory
    >>> from memopt.memory.store import MemoryStore
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
        beta: float = 0.3,
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
            beta: weight of the association.
            where: only these; association does not lead out of them.
            touch: count the results as accessed and as recalled together.

        Raises:
            InputError: no query, top_k below 1, a negative weight, or content that cannot be read.
        """
        check_top_k(top_k)
        if alpha < 0 or beta < 0 or alpha + beta == 0:
            raise InputError(
                f"alpha {alpha} and beta {beta} weigh nothing", fix="use 0.7 and 0.3, not negative"
            )
        content = Content(text=text, vision=vision, audio=audio)
        if vector is None or content.modalities:
            check_content(content, "query")
        query = self.store.embed([content])[0] if vector is None else _unit(vector)
        where = where or Filter()
        similar = dict(self.store.candidates(query, where=where, top_k=_DEPTH * top_k))
        similar |= self._similarity(self._by_words(text, where, top_k) - similar.keys(), query)
        activation: dict[str, float] = {}
        if enable_association and self.graph is not None and similar:
            activation = self._spread(similar)
            new = self._allowed(activation.keys() - similar.keys(), where)
            activation = {k: a for k, a in activation.items() if k in similar or k in new}
            similar |= self._similarity(new, query)
        if not activation:
            alpha, beta = 1.0, 0.0
        scores = {
            key: (alpha * value + beta * activation.get(key, 0.0)) / (alpha + beta)
            for key, value in similar.items()
        }
        best = sorted(scores, key=lambda key: (-scores[key], key))[:top_k]
        memories = self._memories(best)
        found = [
            Retrieved(memories[key], similar[key], activation.get(key, 0.0), scores[key])
            for key in best
            if key in memories
        ]
        if touch and found:
            ids = [result.memory.memory_id for result in found]
            self.store.touch(ids)
            if self.graph is not None:
                self.graph.retrieved(ids)
        return found

    def _by_words(self, text: str | None, where: Filter, top_k: int) -> set[str]:
        if not text or self.store.cipher is not None:
            return set()
        hits = self.store.search(text=text, where=where, top_k=top_k, touch=False)
        return {hit.memory.memory_id for hit in hits}

    def _similarity(self, ids: set[str], query: NDArray[np.float32]) -> dict[str, float]:
        if not ids:
            return {}
        names = ["memory_id", "joint_embedding"]
        table = self.store.rows(sorted(ids), names)
        vectors = table["joint_embedding"].combine_chunks().flatten().to_numpy()
        cosines = np.clip(vectors.reshape(-1, self.store.dim) @ query, 0, 1)
        return dict(zip(table["memory_id"].to_pylist(), cosines.tolist(), strict=True))

    def _allowed(self, ids: set[str], where: Filter) -> set[str]:
        """Return those of ``ids`` that exist, have not expired and pass the filter."""
        if not ids:
            return set()
        if where.ids:
            ids = ids & set(where.ids)
        now = self.store.clock()
        fields = ["memory_id", "timestamp", "category", "tier", "expires_at"]
        flags = ["has_text", "has_vision", "has_audio"]
        kept = set()
        for row in self.store.light(sorted(ids), fields + flags).to_pylist():
            if (
                (row["expires_at"] is None or row["expires_at"] > now)
                and (where.since is None or row["timestamp"] >= where.since)
                and (where.until is None or row["timestamp"] < where.until)
                and (not where.categories or row["category"] in where.categories)
                and (not where.tiers or row["tier"] in where.tiers)
                and (where.modality is None or row[f"has_{where.modality}"])
            ):
                kept.add(row["memory_id"])
        return kept

    def _spread(self, similar: Mapping[str, float]) -> dict[str, float]:
        """Return the activation that reaches each memory over the links, the largest being 1."""
        assert self.graph is not None
        frontier = dict(similar)
        reached: dict[str, float] = {}
        for _ in range(_HOPS):
            strongest = sorted(frontier, key=lambda key: (-frontier[key], key))[:_FRONTIER]
            sources, targets, weights = self.graph.around(strongest)
            passed: dict[str, float] = {}
            for source, target, weight in zip(sources, targets, weights.tolist(), strict=True):
                given = frontier[source] * weight * _PASSED_ON
                passed[target] = max(passed.get(target, 0.0), given)
            frontier = {k: a for k, a in passed.items() if a > reached.get(k, 0.0)}
            reached |= frontier
            if not frontier:
                break
        highest = max(reached.values(), default=0.0)
        return {key: value / highest for key, value in reached.items()} if highest else {}

    def _memories(self, ids: list[str]) -> dict[str, Memory]:
        try:
            found = self.store.get_many(ids, links=False)
        except InputError:
            # One was deleted or expired between the two reads; the others are still answers.
            found = []
            for key in ids:
                try:
                    found.append(self.store.get(key, links=False))
                except (InputError, ConsolidationError):
                    continue
        return {memory.memory_id: memory for memory in found}


def _unit(vector: NDArray[Any]) -> NDArray[np.float32]:
    array = np.asarray(vector, np.float32)
    length = float(np.linalg.norm(array))
    if array.ndim != 1 or not np.isfinite(length) or length == 0:
        raise InputError(
            f"the query vector of shape {array.shape} and length {length} is no direction"
        )
    return array / np.float32(length)
