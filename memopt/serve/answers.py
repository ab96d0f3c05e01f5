"""What answers hold, for the OpenAPI document; ``tests/serve/test_answers.py`` holds them to it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from memopt.tasks.spans import Span

Vector = list[float]


class AnswerBody(Struct, forbid_unknown_fields=True):
    """All of its fields are named; those that may be UNSET may be missing."""


class EmbeddingRow(AnswerBody):
    """One vector: numbers, or float32 in base64, little-endian."""

    object: Literal["embedding"]
    index: int
    embedding: Vector | str


class Usage(AnswerBody):
    """Tokens that were read, and written."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | UnsetType = UNSET


class EmbeddingAnswer(AnswerBody):
    """OpenAI's list of vectors."""

    object: Literal["list"]
    data: list[EmbeddingRow]
    model: str
    usage: Usage


Finish = Literal["stop", "length"] | None


class CompletionChoice(AnswerBody):
    """A text."""

    index: int
    text: str
    finish_reason: Finish
    logprobs: None


class CompletionAnswer(AnswerBody):
    """OpenAI's completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatMessage(AnswerBody):
    """What the model says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(AnswerBody):
    """A message."""

    index: int
    message: ChatMessage
    finish_reason: Finish
    logprobs: None


class ChatAnswer(AnswerBody):
    """OpenAI's chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionPiece(AnswerBody):
    """An event of a streamed completion; the last one has the usage."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET


class ChatDelta(AnswerBody):
    """What a message goes on with; empty in the last event."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatPieceChoice(AnswerBody):
    """A piece of a message."""

    index: int
    delta: ChatDelta
    finish_reason: Finish
    logprobs: None


class ChatPiece(AnswerBody):
    """An event of a streamed chat; the last one has the usage."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatPieceChoice]
    usage: Usage | UnsetType = UNSET


class RankedDocument(AnswerBody):
    """A document's text."""

    text: str


class RankedResult(AnswerBody):
    """A document by its place in the request."""

    index: int
    relevance_score: float
    document: RankedDocument | UnsetType = UNSET


class RerankAnswer(AnswerBody):
    """Cohere's and Jina's: to ``documents``."""

    model: str
    results: list[RankedResult]


class RankedText(AnswerBody):
    """TEI's: to ``texts``."""

    index: int
    score: float
    text: str | UnsetType = UNSET


class SparseValue(AnswerBody):
    """The weight of a word."""

    index: int
    value: float


class LabelScore(AnswerBody):
    """A label, the likeliest first."""

    label: str
    score: float


class Token(AnswerBody):
    """A token; ``start`` and ``stop`` are characters, null of special ones."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class ModelEntry(AnswerBody):
    """A model as OpenAI lists it, and its task."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: str


class ModelsAnswer(AnswerBody):
    """The models here."""

    object: Literal["list"]
    data: list[ModelEntry]


class ModelState(AnswerBody):
    """A model; what is known only of an open one is missing of others."""

    name: str
    task: str
    open: bool
    device: str | UnsetType | None = UNSET
    variant: str | UnsetType | None = UNSET
    runtime: str | UnsetType | None = UNSET
    fill: Annotated[float, Meta(ge=0, description="Of the tokens of a batch")] | UnsetType = UNSET
    queue: int | UnsetType = UNSET
    fallbacks: list[str] | UnsetType = UNSET


class ModelType(AnswerBody):
    """A model's task."""

    task: str


class InfoAnswer(AnswerBody):
    """TEI's /info, of the first model, and all of them."""

    model_id: str
    model_type: ModelType
    max_input_length: int | None
    max_client_batch_size: int
    max_batch_tokens: int
    version: str
    rss_mb: float
    models: list[ModelState]


class HealthAnswer(AnswerBody):
    """The process lives."""

    status: Literal["ok"]


class StateAnswer(AnswerBody):
    """What the page shows."""

    uptime_seconds: int
    requests_per_second: float
    failures_per_second: float
    p50_ms: float
    p99_ms: float
    queue_ms: float
    compute_ms: float
    rss_mb: float
    memory_limit_mb: float | None
    models: list[ModelState]


class OpenAnswer(AnswerBody):
    """Whether a model is open now."""

    model: str
    open: bool


class AddedAnswer(AnswerBody):
    """A memory's id, and whether it is new."""

    memory_id: str
    added: bool


class MemoryAnswer(AnswerBody):
    """One memory: media as their sizes, no vector."""

    memory_id: str
    timestamp: datetime
    access_count: int
    category: str
    tier: str
    model_id: str
    source_memory_ids: list[str]
    source_count: int
    modalities: list[str]
    text: str | UnsetType = UNSET
    summary: str | UnsetType = UNSET
    vision_data_bytes: int | UnsetType = UNSET
    audio_data_bytes: int | UnsetType = UNSET
    association_links: list[list[str | float]] | UnsetType = UNSET
    last_access: datetime | UnsetType = UNSET
    expires_at: datetime | UnsetType = UNSET
    consolidated_at: datetime | UnsetType = UNSET


class MemoryHit(MemoryAnswer, kw_only=True):
    """One memory that answers a question; a long text is cut, its length is beside it."""

    score: float
    text_characters: int | UnsetType = UNSET
    summary_characters: int | UnsetType = UNSET


class MemoriesAnswer(AnswerBody):
    """The best first."""

    memories: list[MemoryHit]


class ForgottenAnswer(AnswerBody):
    """How many memories were erased."""

    forgotten: int
    bytes_freed: int


VECTORS = list[Vector]
TOKEN_VECTORS = list[list[Vector]]
SPARSE = list[list[SparseValue]]
LABELS = list[LabelScore], list[list[LabelScore]]  # of one input, of several
RANKED = RerankAnswer, list[RankedText]
TAGS = list[list[Span]]
COSINES = list[float]
TOKENS = list[list[Token]]
