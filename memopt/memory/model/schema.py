"""What a memory is: the record, the Arrow schemas of the tables and of the interchange files.

A store is a LanceDB database. Its tables:

    memories    one row per memory, short-term, long-term (summaries) and archived alike, so that a
                step of the lifecycle is one commit on one table
    edges       the association graph, each undirected edge as two rows
    access_log  append-only: every read, write and delete
    events      what went wrong or another way: failures, retries, fallbacks

and beside them ``memory.json`` (format version, dimension, model, encryption check value).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

# What is read up to. Encrypted stores are written as 2, all cells tied to their rows; plain ones as
# 1, which a memopt of before opens too.
FORMAT_VERSION, PLAIN_FORMAT = 2, 1
DEFAULT_DIM = 768
SHORT_TERM, LONG_TERM, ARCHIVED = "short_term", "long_term", "archived"
TIERS = (SHORT_TERM, LONG_TERM, ARCHIVED)
MODALITIES = ("text", "vision", "audio")
# Column of a memory -> the field of Content that it holds.
CONTENT_COLUMNS = {"text": "text", "vision_data": "vision", "audio_data": "audio"}
TIMESTAMP = pa.timestamp("us", tz="UTC")
# A column of the table only, made from text and summary with each row (memopt.memory.store.cells).
WORDS = pa.field("words", pa.string())
# The column of signs that only a compact store has (memopt.memory.model.signs).
BITS = "joint_bits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What is seen, heard or read at one moment: the input of an embedder and of a new memory.

    Attributes:
        text: any Unicode text.
        vision: bytes of an encoded image (.png, .jpg).
        audio: bytes of an encoded sound (.wav).

    >>> Content(text="a red door").modalities
    ('text',)
    """

    text: str | None = None
    vision: bytes | None = None
    audio: bytes | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities present, in the order of MODALITIES."""
        return tuple(name for name in MODALITIES if getattr(self, name) is not None)


class Embedder(Protocol):
    """Turns content into vectors; adapters over ArrowEngine and the joint layer fit it."""

    @property
    def model_id(self) -> str:
        """What made the vectors; vectors of two different ids are never compared."""

    @property
    def dim(self) -> int:
        """Length of a vector."""

    def embed(self, items: Sequence[Content]) -> NDArray[np.float32]:
        """Return L2-normalised vectors, float32 (n, dim), one per item."""


@dataclass(frozen=True, slots=True)
class Link:
    """One edge of the association graph, seen from a memory."""

    linked_id: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Memory:
    """One memory as it is read back.

    Attributes:
        joint_embedding: float32 (dim,), L2-normalised.
        association_links: strongest first; empty where the reader did not ask for them.
        timestamp: when it happened, UTC, microseconds.
        tier: one of TIERS.
        summary: the condensed text, of long-term memories.
        source_memory_ids: what a summary condenses.
    """

    memory_id: str
    text: str | None = None
    vision_data: bytes | None = None
    audio_data: bytes | None = None
    joint_embedding: NDArray[np.float32] | None = None
    association_links: tuple[Link, ...] = ()
    timestamp: datetime = datetime(1970, 1, 1, tzinfo=UTC)
    access_count: int = 0
    category: str = ""
    last_access: datetime | None = None
    tier: str = SHORT_TERM
    expires_at: datetime | None = None
    model_id: str = ""
    summary: str | None = None
    source_memory_ids: tuple[str, ...] = ()
    source_count: int = 0
    consolidated_at: datetime | None = None
    modalities: tuple[str, ...] = ()


def as_dict(memory: Memory, *, links: bool = True) -> dict[str, object]:
    """Return a memory as JSON takes it: media as their sizes, no vector.

    >>> as_dict(Memory(memory_id="a", vision_data=b"xyz"), links=False)["vision_data_bytes"]
    3
    """
    document: dict[str, object] = {}
    for entry in fields(memory):
        name, value = entry.name, getattr(memory, entry.name)
        if name == "joint_embedding" or (name == "association_links" and not links):
            continue
        if isinstance(value, bytes):
            document[f"{name}_bytes"] = len(value)
        elif name == "association_links":
            document[name] = [[link.linked_id, round(link.weight, 4)] for link in value]
        elif isinstance(value, datetime):
            document[name] = value.isoformat()
        elif value is not None:
            document[name] = list(value) if isinstance(value, tuple) else value
    return document


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMemory:
    """What is given to ``MemoryStore.add``.

    Attributes:
        embedding: float (dim,); computed by the store's embedder when absent.
        memory_id: chosen by the caller; by default a hash of the content and the category, so that
            adding the same thing twice stores it once.
        origin: where it comes from, as a file and line; named in errors, not stored.
    """

    content: Content
    category: str = ""
    timestamp: datetime | None = None
    embedding: NDArray[np.float32] | None = None
    expires_at: datetime | None = None
    memory_id: str | None = None
    origin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which memories count; every set field narrows. Values are bound, never pasted as text.

    Attributes:
        since, until: bounds of ``timestamp``, since inclusive, until exclusive.
        categories, tiers, ids: any of them.
        modality: memories that have it.
    """

    since: datetime | None = None
    until: datetime | None = None
    categories: tuple[str, ...] = ()
    tiers: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    modality: str | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """A memory found, with its cosine similarity to the query (or its text-search score), 0..1."""

    memory: Memory
    score: float


@dataclass(frozen=True, slots=True)
class AddResult:
    """What became of memories that were added.

    Attributes:
        ids: in the order given.
        added: how many were new.
        already: how many were there; their end was put off where the new one is later.
        differing: those of ``already`` whose chosen id holds other content, which stays.
    """

    ids: tuple[str, ...]
    added: int
    already: int = field(default=0)
    differing: tuple[str, ...] = ()


def memories_schema(dim: int) -> pa.Schema:
    """Return the schema of the ``memories`` table.

    ``packed`` holds the media of archived memories and all content of encrypted ones, which then
    are null in their columns; ``codec`` says how ('' plain columns, 'zstd', 'aesgcm2:KEY_ID',
    'zstd+aesgcm2:KEY_ID'; 'aesgcm:KEY_ID' before cells were tied to their rows).

    >>> memories_schema(4).field("joint_embedding").type
    FixedSizeListType(fixed_size_list<item: float>[4])
    """
    return pa.schema(
        [
            pa.field("memory_id", pa.string(), nullable=False),
            pa.field("text", pa.string()),
            pa.field("vision_data", pa.large_binary()),
            pa.field("audio_data", pa.large_binary()),
            pa.field("joint_embedding", pa.list_(pa.float32(), dim), nullable=False),
            pa.field("timestamp", TIMESTAMP, nullable=False),
            pa.field("access_count", pa.int64(), nullable=False),
            pa.field("category", pa.string(), nullable=False),
            pa.field("last_access", TIMESTAMP),
            pa.field("tier", pa.string(), nullable=False),
            pa.field("expires_at", TIMESTAMP),
            pa.field("model_id", pa.string(), nullable=False),
            pa.field("summary", pa.string()),
            pa.field("source_memory_ids", pa.list_(pa.string())),
            pa.field("source_count", pa.int64(), nullable=False),
            pa.field("consolidated_at", TIMESTAMP),
            # A summary is text too.
            pa.field("has_text", pa.bool_(), nullable=False),
            pa.field("has_vision", pa.bool_(), nullable=False),
            pa.field("has_audio", pa.bool_(), nullable=False),
            pa.field("codec", pa.string(), nullable=False),
            pa.field("packed", pa.large_binary()),
        ]
    )


EDGES = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # time | similarity | co_retrieval
        pa.field("updated_at", TIMESTAMP, nullable=False),
    ]
)

ACCESS_LOG = pa.schema(
    [
        pa.field("at", TIMESTAMP, nullable=False),
        pa.field("actor", pa.string(), nullable=False),
        pa.field("action", pa.string(), nullable=False),  # read | write | delete | export | ...
        pa.field("memory_ids", pa.list_(pa.string()), nullable=False),
        pa.field("detail", pa.string()),
    ]
)

EVENTS = pa.schema(
    [
        pa.field("at", TIMESTAMP, nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("memory_ids", pa.list_(pa.string()), nullable=False),
        pa.field("retry_at", TIMESTAMP),
    ]
)

# The interchange files: what other tools read.
_LINKS = pa.list_(pa.struct([("linked_id", pa.string()), ("weight", pa.float32())]))
MEMORIES_FILE = pa.schema(
    [
        pa.field("memory_id", pa.string()),
        pa.field("text", pa.string()),
        pa.field("vision_data", pa.binary()),
        pa.field("audio_data", pa.binary()),
        pa.field("joint_embedding", pa.list_(pa.float16())),
        pa.field("association_links", _LINKS),
        pa.field("timestamp", pa.timestamp("us")),
        pa.field("access_count", pa.int64()),
        pa.field("category", pa.string()),
        # So that nothing comes back that was to go, and what is archived stays archived.
        pa.field("expires_at", pa.timestamp("us")),
        pa.field("last_access", pa.timestamp("us")),
        pa.field("tier", pa.string()),
        pa.field("consolidated_at", pa.timestamp("us")),
    ]
)
GRAPH_FILE = pa.schema([pa.field("memory_id", pa.string()), pa.field("links", _LINKS)])
LONG_TERM_FILE = pa.schema(
    [
        pa.field("memory_id", pa.string()),
        pa.field("category", pa.string()),
        pa.field("summary", pa.string()),
        pa.field("source_memory_ids", pa.list_(pa.string())),
        pa.field("consolidated_at", pa.timestamp("us")),
        pa.field("source_count", pa.int64()),
    ]
)
