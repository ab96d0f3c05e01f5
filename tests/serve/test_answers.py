"""A real answer of every route is of the form that the OpenAPI document names for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from memopt.bundle import Bundle
from memopt.memory.io.models import Models
from memopt.memory.session import open_memory
from memopt.serve.memories import Memories
from memopt.serve.routes import ROUTES, Route
from tests.serve.conftest import events, running

jsonschema = pytest.importorskip("jsonschema", reason="pip install memopt[dev]")
TEXT, CHAT = {"inputs": "a cat"}, [{"role": "user", "content": "the cat"}]
RANKED = {"query": "cats", "documents": ["a cat", "a dog"], "return_documents": True}
# Bodies of each route; those of others have none. Each is the start of a different form of answer.
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/embeddings": [{"input": ["a", "b"]}, {"input": "a", "encoding_format": "base64"}],
    "/v1/completions": [{"prompt": "the cat", "max_tokens": 3}],
    "/v1/chat/completions": [{"messages": CHAT, "max_tokens": 3}],
    "/v1/rerank": [RANKED, {"query": "cats", "texts": ["a", "b"], "return_text": True}],
    "/rerank": [RANKED, {"query": "cats", "texts": ["a", "b"]}],
    "/embed": [TEXT],
    "/embed_all": [TEXT],
    "/embed_sparse": [TEXT],
    "/predict": [TEXT, {"inputs": ["a cat", ["a", "b"]]}],
    "/classify": [TEXT],
    "/tag": [{"inputs": "a cat sat on the mat in Berlin"}],
    "/similarity": [{"inputs": {"source_sentence": "a", "sentences": ["b"]}}],
    "/tokenize": [TEXT],
    "/v1/memories": [{"text": "The cat is called Tom."}],
    "/v1/memories/search": [{"query": "What is the cat called?"}],
}


@pytest.fixture(scope="module")
def client(
    minilm: Bundle,
    small: dict[str, Bundle],
    writer: Bundle,
    pictures: Bundle,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[httpx.Client]:
    """A server of every task, with a memory of one text and long ones."""
    paths = {"minilm": minilm.path, "llama": writer.path, "vit": pictures.path}
    paths |= {name: bundle.path for name, bundle in small.items()}
    folder = tmp_path_factory.mktemp("memory") / "s"
    with (
        open_memory(folder, models=Models(text=str(minilm.path))) as session,
        running(paths, lazy=True, memories=Memories(session)) as (asked, _),
    ):
        yield asked


def answers(client: httpx.Client, route: Route, picture: str) -> list[httpx.Response]:
    """What a route says to each of its bodies."""
    path = route.path.replace("{name}", "labels")
    if "{memory_id}" in path:
        added = client.post("/v1/memories", json={"text": "A dog barks.", "category": "x"})
        path = path.replace("{memory_id}", added.json()["memory_id"])
    if route.takes is None:
        return [client.request(route.method, path)]
    bodies = BODIES.get(path, [{"input": picture}])
    return [client.post(path, json=body) for body in bodies]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_answers_are_of_their_form(client: httpx.Client, route: Route, picture: str) -> None:
    """Each field is named, none is missing, and an answer with another field would fail."""
    document = client.get("/openapi.json").json()
    operation = document["paths"][route.path][route.method.lower()]
    form = operation["responses"]["200"]["content"][route.kind]["schema"]
    check = jsonschema.Draft202012Validator({**form, "components": document["components"]})
    given = answers(client, route, picture)
    assert given
    for answer in given:
        assert answer.status_code == 200, answer.text
        value = answer.json() if route.kind == "application/json" else answer.text
        check.validate(value)
        assert not check.is_valid(None)
        if isinstance(value, dict):
            assert not check.is_valid({**value, "more": 1})
            assert not check.is_valid(dict(list(value.items())[1:]))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streamed_pieces_are_of_their_form(client: httpx.Client, path: str) -> None:
    """Every event but the last, which is [DONE]."""
    document = client.get("/openapi.json").json()
    answer = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    form = answer["schema"]["properties"]["data"]["contentSchema"]
    check = jsonschema.Draft202012Validator({**form, "components": document["components"]})
    *pieces, end = events(client.post(path, json={**BODIES[path][0], "stream": True}).text)
    assert end == "[DONE]"
    assert "usage" in pieces[-1]
    for piece in pieces:
        check.validate(piece)
        assert not check.is_valid({**piece, "more": 1})


def test_a_long_memory_is_of_the_form_of_a_hit(client: httpx.Client) -> None:
    """Its text is cut, and how long it is stands beside."""
    client.post("/v1/memories", json={"text": "The sea is wide. " * 500}).raise_for_status()
    found = client.post("/v1/memories/search", json={"query": "the wide sea"}).json()
    document = client.get("/openapi.json").json()
    form = {"$ref": "#/components/schemas/MemoriesAnswer", "components": document["components"]}
    jsonschema.Draft202012Validator(form).validate(found)
    assert found["memories"][0]["text_characters"] > 8000
