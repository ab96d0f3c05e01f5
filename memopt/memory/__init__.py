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

from memopt.extras import require
from memopt.onuse import names_on_use

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
_MODULES = {module: names.split() for module, names in _PUBLIC.items()}
__all__ = sorted(name for names in _MODULES.values() for name in names)
__getattr__ = names_on_use(__name__, _MODULES)
