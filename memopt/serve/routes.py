"""The table of routes: path, what it takes, who answers; the OpenAPI document is read off it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from memopt import __version__
from memopt.runtimes.limits import resident_mb
from memopt.serve import answers, memories, schemas, texts, writing
from memopt.serve.exchange import ARROW, Reply, Service


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One row.

    ``takes`` is the struct of the body, None for none; ``form`` allows a form too. ``gives`` is the
    type of the answer, a tuple where the request decides which of several.
    """

    method: str
    path: str
    answer: Callable[..., Awaitable[Reply]]
    gives: Any
    takes: type | None = None
    summary: str = ""
    kind: str = "application/json"
    arrow: bool = False
    stream: Any = None  # the type of an event, where the answer may be streamed
    form: bool = False


async def models(x: Service) -> Reply:
    """The models here, as OpenAI lists them."""
    data = [
        {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "memopt",
            "task": model.task.name,
        }
        for model in x.host.models.values()
    ]
    return Reply(json={"object": "list", "data": data})


async def info(x: Service) -> Reply:
    """The first model, as TEI tells it, and all of them."""
    first = next(iter(x.host.models.values()))
    return Reply(
        json={
            "model_id": first.name,
            "model_type": {"task": first.task.name},
            "max_input_length": first.bundle.manifest.max_length,
            "max_client_batch_size": x.host.limits.inputs,
            "max_batch_tokens": x.host.limits.batch_tokens,
            "version": __version__,
            "rss_mb": round(resident_mb(), 1),
            "models": x.telemetry.now()["models"],
        }
    )


async def health(x: Service) -> Reply:
    """The process lives."""
    return Reply(json={"status": "ok"})


async def state(x: Service) -> Reply:
    """What the page shows: rate, medians, fill, providers, fallbacks."""
    return Reply(json=x.telemetry.now())


async def metrics(x: Service) -> Reply:
    """Counters and times for Prometheus."""
    return Reply(text=x.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def reload(x: Service, name: str) -> Reply:
    """Open a bundle as it is now in the place of the old one; no request is lost."""
    await x.host.named(name).reload()
    return Reply(json={"model": name, "open": True})


async def load(x: Service, name: str) -> Reply:
    """Open a model that is not open yet."""
    async with x.host.use(x.host.named(name)):
        return Reply(json={"model": name, "open": True})


async def unload(x: Service, name: str) -> Reply:
    """Close a model behind its last request; the next one opens it anew."""
    await x.host.named(name).close()
    return Reply(json={"model": name, "open": False})


def _post(path: str, answer: Any, takes: Any, gives: Any, **further: Any) -> Route:
    return Route(method="POST", path=path, answer=answer, takes=takes, gives=gives, **further)


def _get(path: str, answer: Any, gives: Any, **further: Any) -> Route:
    return Route(method="GET", path=path, answer=answer, gives=gives, **further)


ROUTES = (
    _post("/v1/embeddings", texts.embeddings, schemas.EmbeddingRequest, answers.EmbeddingAnswer,
          arrow=True),
    _post("/v1/embeddings/media", texts.media, schemas.MediaRequest, answers.EmbeddingAnswer,
          arrow=True, form=True),
    _post("/v1/completions", writing.completions, schemas.CompletionRequest,
          answers.CompletionAnswer, stream=answers.CompletionPiece),
    _post("/v1/chat/completions", writing.chat, schemas.ChatRequest, answers.ChatAnswer,
          stream=answers.ChatPiece),
    _post("/v1/rerank", texts.rerank, schemas.RerankRequest, answers.RANKED),
    _get("/v1/models", models, answers.ModelsAnswer),
    _post("/rerank", texts.rerank, schemas.RerankRequest, answers.RANKED),
    _post("/embed", texts.embed, schemas.InputsRequest, answers.VECTORS, arrow=True),
    _post("/embed_all", texts.embed_all, schemas.InputsRequest, answers.TOKEN_VECTORS),
    _post("/embed_sparse", texts.embed_sparse, schemas.InputsRequest, answers.SPARSE),
    _post("/predict", texts.predict, schemas.PredictRequest, answers.LABELS),
    _post("/classify", texts.predict, schemas.PredictRequest, answers.LABELS),
    _post("/tag", texts.tag, schemas.TagRequest, answers.TAGS),
    _post("/similarity", texts.similarity, schemas.SimilarityRequest, answers.COSINES),
    _post("/tokenize", texts.tokenize, schemas.TokenizeRequest, answers.TOKENS),
    _post("/v1/memories", memories.add, memories.MemoryRequest, answers.AddedAnswer),
    _post("/v1/memories/search", memories.search, memories.MemorySearchRequest,
          answers.MemoriesAnswer),
    _get("/v1/memories/{memory_id}", memories.get, answers.MemoryAnswer),
    Route(method="DELETE", path="/v1/memories/{memory_id}", answer=memories.delete,
          gives=answers.ForgottenAnswer),
    _get("/info", info, answers.InfoAnswer),
    _get("/health", health, answers.HealthAnswer),
    _get("/state", state, answers.StateAnswer),
    _get("/metrics", metrics, str, kind="text/plain"),
    _post("/models/{name}/reload", reload, None, answers.OpenAnswer),
    _post("/models/{name}/load", load, None, answers.OpenAnswer),
    _post("/models/{name}/unload", unload, None, answers.OpenAnswer),
)  # fmt: skip


# Of a path in an operation's name.
_IN_NAMES = str.maketrans("/", "_", "{}")


def openapi() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of :data:`ROUTES`.

    >>> sorted(openapi()["paths"]["/embed"])
    ['post']
    """
    from memopt.extras import require

    msgspec = require("msgspec", extra="serve", why="describe requests")
    kinds = [
        kind
        for route in ROUTES
        for kind in (route.takes, *_alternatives(route), route.stream)
        if kind
    ]
    described, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    # Types made of others are written where they are used, structs once, by name.
    schema_of = {id(kind): schema for kind, schema in zip(kinds, described, strict=True)}
    components["Error"] = {"type": "object", "required": ["error"], "properties": {"error": {}}}
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "memopt", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _alternatives(route: Route) -> tuple[Any, ...]:
    return route.gives if isinstance(route.gives, tuple) else (route.gives,)


def _answers(route: Route, schema_of: dict[int, Any]) -> dict[str, Any]:
    """Return the content of the 200 answer: a schema for each media type."""
    schemas = [schema_of[id(kind)] for kind in _alternatives(route)]
    content = {route.kind: {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}
    if route.arrow:
        vectors = "an Arrow stream with one column, vector: fixed_size_list<float32>"
        content[ARROW] = {"schema": {"type": "string", "format": "binary", "description": vectors}}
    if route.stream:
        data = {
            "type": "string",
            "description": "JSON; of an error as under 400; [DONE] is the last",
            "contentMediaType": "application/json",
            "contentSchema": schema_of[id(route.stream)],
        }
        event = {"type": "object", "required": ["data"], "properties": {"data": data}}
        content["text/event-stream"] = {"schema": event}
    return content


def _operation(route: Route, schema_of: dict[int, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    codes = {
        400: "a wrong request",
        401: "no such key",
        403: "a foreign host",
        404: "no such model, or memory",
    }
    codes |= {413: "too large", 415: "no JSON", 422: "not of the form", 429: "too much waits"}
    codes |= {501: "an extra is missing", 503: "stopping, or too late"}
    found: dict[str, Any] = {
        "summary": (route.summary or route.answer.__doc__ or "").strip().splitlines()[0],
        "operationId": route.method.lower() + route.path.translate(_IN_NAMES),
        "responses": {
            "200": {"description": "the answer", "content": _answers(route, schema_of)},
            **{str(c): {"description": why, "content": error} for c, why in codes.items()},
        },
    }
    if "{" in route.path:
        name = route.path.partition("{")[2].partition("}")[0]
        schema = {"type": "string"}
        found["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema}]
    if route.takes:
        content: dict[str, Any] = {"application/json": {"schema": schema_of[id(route.takes)]}}
        if route.form:
            parts = {"type": "array", "items": {"type": "string", "format": "binary"}}
            form = {"type": "object", "properties": {"file": parts, "model": {"type": "string"}}}
            content["multipart/form-data"] = {"schema": form}
        found["requestBody"] = {"required": True, "content": content}
    return found
