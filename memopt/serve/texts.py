"""Routes for models that answer at once: vectors, scores, labels, tokens."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

from memopt.runtimes.text import TokenIds, open_tokenizer
from memopt.serve import schemas, work
from memopt.serve.exchange import Reply, Service
from memopt.serve.failures import Refusal
from memopt.tasks.table import Task


def listed(inputs: Any) -> list[Any]:
    """Return one text or several, or token ids, as items of an engine.

    Raises:
        Refusal: texts and token ids are mixed.

    >>> listed("a"), listed([1, 2])
    (['a'], [TokenIds(ids=(1, 2))])
    """
    if isinstance(inputs, str):
        return [inputs]
    if inputs and all(isinstance(part, int) for part in inputs):
        return [TokenIds(tuple(inputs))]
    if any(isinstance(part, int) for part in inputs):
        raise Refusal(400, "input mixes token ids and texts", fix="give one kind")
    return [item if isinstance(item, str) else TokenIds(tuple(item)) for item in inputs]


def _vectors(task: Task) -> bool:
    return task.embeds and task.modality == "text"


async def embeddings(x: Service, body: schemas.EmbeddingRequest) -> Reply:
    """Vectors of texts, as OpenAI gives them."""
    items = listed(body.input)
    if not items:
        raise Refusal(400, "input is empty", fix="give a text")
    model = x.find(body.model, _vectors, "/v1/embeddings")
    verb = work.embed(prompt_name=body.prompt_name, dimension=body.dimensions)
    answers = (await x.answer(model, verb, items)).answers
    vectors = [vector for vector, _ in answers]
    if x.wants_arrow:
        return Reply(arrow=vectors)
    return Reply(json=_openai(vectors, sum(n for _, n in answers), model.name, body))


def _openai(vectors: Sequence[Any], tokens: int, model: str, body: Any) -> dict[str, Any]:
    whole = getattr(body, "encoding_format", "float") == "float"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": v if whole else base64.b64encode(v.astype("<f4").tobytes()).decode(),
        }
        for index, v in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


async def media(x: Service, body: schemas.MediaRequest) -> Reply:
    """Vectors of pictures or sounds, sent as data URLs or as parts of a form."""
    from memopt.serve.media import decoded

    urls = [body.input] if isinstance(body.input, str) else body.input
    model = x.find(body.model, lambda t: t.embeds and t.modality in ("image", "audio"), "media")
    items = [decoded(url, number) for number, url in enumerate(urls)]
    answers = (await x.answer(model, work.embed(), items)).answers
    vectors = [vector for vector, _ in answers]
    return (
        Reply(arrow=vectors) if x.wants_arrow else Reply(json=_openai(vectors, 0, model.name, body))
    )


async def embed(x: Service, body: schemas.InputsRequest) -> Reply:
    """Vectors of texts, as Text Embeddings Inference gives them."""
    model = x.find(body.model, _vectors, "/embed")
    verb = work.embed(
        normalize=body.normalize, prompt_name=body.prompt_name, dimension=body.dimensions
    )
    answers = (await x.answer(model, verb, listed(body.inputs))).answers
    vectors = [vector for vector, _ in answers]
    return Reply(arrow=vectors) if x.wants_arrow else Reply(json=vectors)


async def embed_all(x: Service, body: schemas.InputsRequest) -> Reply:
    """Vectors of each text's tokens, of a late-interaction model."""
    model = x.find(body.model, lambda t: t.name == "late-interaction", "/embed_all")
    return Reply(json=(await x.answer(model, work.embed_tokens, listed(body.inputs))).answers)


async def embed_sparse(x: Service, body: schemas.InputsRequest) -> Reply:
    """Weights of words, by their ids."""
    model = x.find(body.model, lambda t: t.name == "sparse-embedding", "/embed_sparse")
    rows = (await x.answer(model, work.embed_sparse, listed(body.inputs))).answers
    return Reply(
        json=[
            [
                {"index": int(column), "value": float(value)}
                for column, value in zip(columns, values, strict=True)
            ]
            for columns, values in rows
        ]
    )


async def rerank(x: Service, body: schemas.RerankRequest) -> Reply:
    """Documents in the order of how well they answer a query; Cohere's form, or TEI's."""
    given = body.texts if body.texts is not None else body.documents
    if given is None or (body.texts is not None and body.documents is not None):
        raise Refusal(400, "rerank needs documents, or texts", fix="give one of them")
    texts = [document if isinstance(document, str) else document.get("text") for document in given]
    if not all(isinstance(text, str) for text in texts):
        raise Refusal(400, "a document has no text", fix='give a string, or {"text": "..."}')
    model = x.find(body.model, lambda t: t.name == "reranking", "/rerank")
    scores = (await x.answer(model, work.score, [(body.query, text) for text in texts])).answers
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n]
    if body.texts is not None:
        return Reply(
            json=[
                {"index": i, "score": scores[i], **({"text": texts[i]} if body.return_text else {})}
                for i in order
            ]
        )
    results = [
        {
            "index": i,
            "relevance_score": scores[i],
            **({"document": {"text": texts[i]}} if body.return_documents else {}),
        }
        for i in order
    ]
    return Reply(json={"model": model.name, "results": results})


async def predict(x: Service, body: schemas.PredictRequest) -> Reply:
    """Labels and their scores of a text, of a pair of texts, or of several."""
    one, items = _predicted(body.inputs)
    model = x.find(
        body.model,
        lambda t: t.name.endswith("text-classification"),
        "/predict",
    )
    rows = (await x.answer(model, work.classify, items)).answers
    told = [
        [{"label": n, "score": s} for n, s in zip(row.labels, row.scores, strict=True)]
        for row in rows
    ]
    return Reply(json=told[0] if one else told)


def _predicted(inputs: Any) -> tuple[bool, list[Any]]:
    """Return whether it is one input, and the inputs: texts, or pairs of texts."""
    if isinstance(inputs, str):
        return True, [inputs]
    items = []
    for number, item in enumerate(inputs):
        parts = [item] if isinstance(item, str) else item
        pair = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
        if not pair or not 1 <= len(parts) <= 2:
            raise Refusal(400, f"input {number} is neither a text nor a pair of texts")
        items.append(parts[0] if len(parts) == 1 else tuple(parts))
    return False, items


async def tag(x: Service, body: schemas.TagRequest) -> Reply:
    """The labelled parts of texts: label, score, characters."""
    from dataclasses import asdict

    model = x.find(body.model, lambda t: t.name == "token-classification", "/tag")
    rows = (await x.answer(model, work.tag, listed(body.inputs))).answers
    return Reply(json=[[asdict(span) for span in row] for row in rows])


async def similarity(x: Service, body: schemas.SimilarityRequest) -> Reply:
    """Cosines of a text with others."""
    model = x.find(body.model, _vectors, "/similarity")
    texts = [body.inputs.source_sentence, *body.inputs.sentences]
    vectors = (await x.answer(model, work.embed(), texts)).answers
    return Reply(json=work.similarity(vectors))


async def tokenize(x: Service, body: schemas.TokenizeRequest) -> Reply:
    """Token ids of texts, with the characters of each, as TEI gives them."""
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    model = x.find(body.model, lambda t: t.modality == "text", "/tokenize")
    begin = time.perf_counter()
    encodings = open_tokenizer(model.bundle).encode_batch(
        texts, add_special_tokens=body.add_special_tokens
    )
    x.telemetry.tokenized(time.perf_counter() - begin)
    return Reply(
        json=[
            [
                {
                    "id": token,
                    "text": text,
                    "special": bool(special),
                    "start": None if special else span[0],
                    "stop": None if special else span[1],
                }
                for token, text, special, span in zip(
                    e.ids, e.tokens, e.special_tokens_mask, e.offsets, strict=True
                )
            ]
            for e in encodings
        ]
    )


def dumped(value: Any) -> bytes:
    """Return JSON; float32 arrays in the fewest digits that give them back.

    >>> import numpy as np
    >>> dumped([np.array([0.1, 1.5], np.float32)])
    b'[[0.1,1.5]]'
    """
    from memopt.extras import require

    orjson = require("orjson", extra="serve", why="write JSON")
    return bytes(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))
