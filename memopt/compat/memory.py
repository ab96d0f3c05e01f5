"""Retrieval from the vectors of modalities, ranking, and the consolidation worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import InputError
from memopt.memory.graph import retriever
from memopt.memory.graph.association import AssociationGraph
from memopt.memory.lifecycle import tiering
from memopt.memory.lifecycle import worker as consolidation
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from memopt.settings import ConsolidationSection as ConsolidationConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ConsolidationConfig",
    "ConsolidationWorker",
    "HotColdTiering",
    "MemoryStats",
    "MultimodalRetriever",
]
_EMBEDDINGS = ("vision", "audio", "text")


class MultimodalRetriever:
    """A store asked with vectors of modalities, or with the bytes of a picture or a sound.

    Args:
        storage_path: the store; made when absent.
        joint_embedding_layer: a :class:`memopt.joint.layer.JointEmbeddingLayer`.
        alpha, beta: weights of similarity and association.
        encoders: what makes vectors of text, and of bytes: ``{"text": ArrowEngine, ...}``.
    """

    def __init__(
        self,
        storage_path: str | Path,
        joint_embedding_layer: Any,
        alpha: float = 0.7,
        beta: float = 0.3,
        *,
        encoders: Mapping[str, Any] | None = None,
    ) -> None:
        self.joint_embedding_layer = joint_embedding_layer
        self.alpha, self.beta, self.encoders = alpha, beta, dict(encoders or {})
        self.store = MemoryStore(storage_path, dim=joint_embedding_layer.dim)
        self.graph = AssociationGraph(self.store)
        self._retriever = retriever.MultimodalRetriever(self.store, self.graph)

    async def store_memory(
        self,
        vision_emb: NDArray[Any] | None = None,
        audio_emb: NDArray[Any] | None = None,
        text: str | None = None,
        *,
        vision_data: bytes | None = None,
        audio_data: bytes | None = None,
        category: str = "",
    ) -> str:
        """Store what was seen, heard and read together; return the memory's id.

        Raises:
            InputError: neither text nor data, which alone can be shown again; a vector of another
                dimension, or text without an encoder of text.
        """
        vector = self._joint(
            vision_data if vision_emb is None else vision_emb,
            audio_data if audio_emb is None else audio_emb,
            text,
        )
        content = Content(text=text, vision=vision_data, audio=audio_data)
        new = NewMemory(content=content, category=category, embedding=vector)
        return self.store.add([new]).ids[0]

    def retrieve(
        self,
        query_vision: NDArray[Any] | bytes | None = None,
        query_audio: NDArray[Any] | bytes | None = None,
        query_text: str | None = None,
        top_k: int = 10,
        enable_association: bool = True,
    ) -> list[retriever.Retrieved]:
        """Return the best memories, best first.

        Raises:
            InputError: no query, a vector of another dimension, or bytes without an encoder.
        """
        return self._retriever.retrieve(
            query_text,
            vector=self._joint(query_vision, query_audio, query_text),
            top_k=top_k,
            enable_association=enable_association,
            alpha=self.alpha,
            beta=self.beta,
        )

    def build_association_graph(self) -> None:
        """Nothing to do: memories are linked as they come."""

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def _joint(self, *queries: Any) -> NDArray[np.float32]:
        named = dict(zip(_EMBEDDINGS, queries, strict=True))
        given = {name: query for name, query in named.items() if query is not None}
        if not given:
            raise InputError("no query", fix="give query_vision, query_audio or query_text")
        vectors = {name: self._vector(name, query)[None] for name, query in given.items()}
        joint: NDArray[np.float32] = self.joint_embedding_layer.embed(**vectors)[0]
        return joint

    def _vector(self, modality: str, query: Any) -> NDArray[np.float32]:
        if isinstance(query, np.ndarray):
            return np.asarray(query, np.float32)
        if modality not in self.encoders:
            raise InputError(
                f"{modality} is {type(query).__name__} and there is no encoder of it",
                fix=f"pass encoders={{{modality!r}: ArrowEngine(BUNDLE)}}, or its vector",
            )
        return np.asarray(self.encoders[modality].encode([query])[0], np.float32)


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """What :class:`HotColdTiering` ranks by."""

    memory_id: str
    access_count: int
    last_access: datetime
    created_at: datetime
    size_bytes: int = 0
    category: str = "general"


class HotColdTiering:
    """Ranks memories that are given, and not those of a store.

    >>> then = datetime(2026, 1, 1, tzinfo=UTC)
    >>> old = MemoryStats("a", 1, then, then)
    >>> new = MemoryStats("b", 1, then.replace(year=2027), then)
    >>> [m.memory_id for m, _ in HotColdTiering().rank_memories([old, new], {})]
    ['b', 'a']
    """

    def __init__(self, alpha: float = 0.6, beta: float = 0.4) -> None:
        self.alpha, self.beta = alpha, beta

    def rank_memories(
        self, memories: Sequence[MemoryStats], memory_contents: Mapping[str, str]
    ) -> list[tuple[MemoryStats, float]]:
        """Return (memory, score), best first: recency and relevance as a store ranks them."""
        if not memories:
            return []
        used = np.array([_utc(memory.last_access).timestamp() for memory in memories])
        texts = [memory_contents.get(memory.memory_id, "") for memory in memories]
        recency, relevance = tiering.recency_and_relevance(used, texts)
        scores = self.alpha * recency + self.beta * relevance
        pairs = zip(memories, scores.tolist(), strict=True)
        return sorted(pairs, key=lambda pair: (-pair[1], pair[0].memory_id))


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class ConsolidationWorker(consolidation.ConsolidationWorker):
    """:class:`memopt.memory.lifecycle.worker.ConsolidationWorker` of settings and a folder."""

    def __init__(self, config: ConsolidationConfig, storage_path: str | Path) -> None:
        from memopt.memory.lifecycle import from_settings as configured

        store = MemoryStore(storage_path, create=False)
        super().__init__(
            store,
            configured.recipe(config),
            triggers=configured.triggers(config),
            llm=configured.summariser(config, None, redact=store.redact, where={}),
        )
