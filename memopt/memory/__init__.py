"""A durable multimodal memory: store, search, association, lifecycle, privacy.

    model/      what a memory is: schema, content, vectors as rows, words; no database
    store/      one database: its tables, lock and keys of cells; reads, writes, upkeep
    search/     what is near a vector or answers a question
    io/         the Parquet files other tools read
    graph/      what reminds of what, and retrieval that follows it
    privacy/    redaction, keys, access log, erasure
    lifecycle/  consolidation, retention, tiers, checks

Each room uses those above it in this list. :class:`MemoryStore` joins the first four,
:func:`open_memory` all of them. The names below are imported on use.
"""

from importlib import import_module
from typing import Any

from memopt.extras import require

require("pyarrow", extra="memory", why="keep a memory")

_PUBLIC = {
    "memory_store": "MemoryStore",
    "session": "Models Session open_memory",
    "model.schema": "AddResult Content Filter Hit Link Memory NewMemory memories_schema "
    "ACCESS_LOG EDGES EVENTS GRAPH_FILE LONG_TERM_FILE MEMORIES_FILE",
    "model.encoders": "AudioEncoder JointEmbedder TextEmbedder TextEncoder VisionEncoder",
    "graph.association": "AssociationGraph GraphRecipe",
    "graph.retriever": "MultimodalRetriever Retrieved",
    "store.observers": "StoreObserver",
    "privacy.access_log": "AccessLog read_log",
    "privacy.erase": "erase forget reclaim",
    "privacy.keys": "AesGcm read_cipher rotate",
    "privacy.redaction": "redactor",
    "lifecycle.consolidation": "Consolidation consolidate",
    "lifecycle.plan": "ConsolidationRecipe",
    "lifecycle.retention": "retain",
    "lifecycle.tiering": "HotColdTiering",
    "lifecycle.verify": "verify",
    "lifecycle.schedule": "Triggers",
    "lifecycle.worker": "ConsolidationWorker",
}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
