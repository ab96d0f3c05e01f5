"""What requests hold; msgspec checks it and describes it for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=1)]
Text = str
Tokens = list[int]
Messages = Annotated[list[dict[str, Any]], Meta(min_length=1)]


class EmbeddingRequest(Struct, kw_only=True):
    """OpenAI's /v1/embeddings. ``input`` is one text or several, or their token ids."""

    input: Text | list[Text | int | Tokens]
    model: str = ""
    dimensions: Count | None = None
    encoding_format: Literal["float", "base64"] = "float"
    prompt_name: str | None = None
    user: str | None = None


class MediaRequest(Struct, kw_only=True):
    """Pictures or sounds as data URLs (``data:image/png;base64,...``)."""

    input: str | list[str]
    model: str = ""


class CompletionRequest(Struct, kw_only=True):
    """OpenAI's /v1/completions."""

    prompt: str
    model: str = ""
    max_tokens: Count = 128
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False


class ChatRequest(Struct, kw_only=True):
    """OpenAI's /v1/chat/completions; ``content`` is text, or a list of parts of type text."""

    messages: Messages
    model: str = ""
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None


class RerankRequest(Struct, kw_only=True):
    """Cohere's and Jina's (``documents``, ``top_n``) or TEI's (``texts``) /rerank."""

    query: str
    documents: list[str | dict[str, Any]] | None = None
    texts: list[str] | None = None
    model: str = ""
    top_n: Count | None = None
    return_documents: bool = False
    return_text: bool = False
    raw_scores: bool = False
    truncate: bool = True


class InputsRequest(Struct, kw_only=True):
    """TEI's /embed, /embed_all, /embed_sparse: one text or several, or their token ids."""

    inputs: Text | list[Text | int | Tokens]
    model: str = ""
    normalize: bool = True
    truncate: bool = True
    prompt_name: str | None = None
    dimensions: Count | None = None


class PredictRequest(Struct, kw_only=True):
    """TEI's /predict and /classify: a text, a pair of texts, or a list of them."""

    inputs: str | list[Any]
    model: str = ""
    raw_scores: bool = False
    truncate: bool = True


class TagRequest(Struct, kw_only=True):
    """Texts whose labelled parts are wanted."""

    inputs: str | list[str]
    model: str = ""


class Similarity(Struct, kw_only=True):
    """A text and those it is compared with."""

    source_sentence: str
    sentences: Annotated[list[str], Meta(min_length=1)]


class SimilarityRequest(Struct, kw_only=True):
    """TEI's /similarity."""

    inputs: Similarity
    model: str = ""


class TokenizeRequest(Struct, kw_only=True):
    """TEI's /tokenize."""

    inputs: str | list[str]
    model: str = ""
    add_special_tokens: bool = True
