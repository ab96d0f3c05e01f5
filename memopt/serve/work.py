"""What is asked of an engine, as something that requests of many clients can share."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memopt.errors import InputError
from memopt.runtimes.batcher import Answered, Run
from memopt.runtimes.text import TokenIds
from memopt.runtimes.vectors import unit_length
from memopt.serve.failures import Refusal
from memopt.serve.hosting import Host, Hosted
from memopt.serve.telemetry import Telemetry
from memopt.tasks.classes import ranked_labels

# Tokens that a picture or a second of sound stands for in a batch.
_PICTURE, _SOUND = 256, 512
_LONGEST = 8192


@dataclass(frozen=True, slots=True)
class Work:
    """A verb with its settings: ``key`` is equal for what may share a batch."""

    key: Hashable
    run: Run


async def answer(
    host: Host, telemetry: Telemetry, model: Hosted, work: Any, items: Sequence[Any]
) -> Answered:
    """Return a model's answers to the inputs of one request, computed beside other requests'.

    Args:
        work: of the functions below: engine -> Work.

    Raises:
        Refusal: too many inputs, no room in the queue or in memory.
        InputError: an input that cannot be used, named by its position.
    """
    if len(items) > host.limits.inputs:
        raise Refusal(413, f"{len(items)} inputs; a request may have {host.limits.inputs}")
    async with host.use(model) as opened:
        wanted: Work = work(opened.engine)
        future = opened.batcher.submit(
            wanted.key,
            wanted.run,
            items,
            [cost(item) for item in items],
            seconds=host.limits.seconds,
        )
        answered = await asyncio.wrap_future(future)
    for index, found in enumerate(answered.answers):
        if isinstance(found, str):
            raise InputError(f"input {index} {found}", fix="leave it out")
    telemetry.computed(model.name, answered.queued, answered.computed)
    return answered


def cost(item: Any) -> int:
    """Return about how many tokens an input is.

    >>> cost("a cat sat on the mat"), cost(("query", "document"))
    (7, 7)
    """
    if isinstance(item, str):
        return min(len(item) // 4 + 2, _LONGEST)
    if isinstance(item, TokenIds):
        return len(item)
    if isinstance(item, tuple) and all(isinstance(part, str) for part in item):
        return sum(map(cost, item))
    return _SOUND if isinstance(item, tuple) else _PICTURE


def embed(
    *, normalize: bool = True, prompt_name: str | None = None, dimension: int | None = None
) -> Any:
    """Return (vector float32, tokens) of each input."""

    def work(engine: Any) -> Work:
        engine.shortened(dimension)
        prompt = engine.prompt(None, prompt_name)

        def run(items: Sequence[Any]) -> list[Any]:
            encoded = engine.encode_each(items, normalize=False, prompt=prompt, dimension=dimension)
            if normalize:
                unit_length(encoded.vectors)
            pairs = zip(encoded.vectors, encoded.tokens.tolist(), strict=True)
            return [encoded.failures.get(i, pair) for i, pair in enumerate(pairs)]

        return Work(("embed", normalize, prompt, dimension), run)

    return work


def embed_tokens(engine: Any) -> Work:
    """Return the vectors of each text's tokens, float32 (tokens, dimension): late interaction."""
    return Work("late", lambda items: list(engine.encode(list(items))))


def embed_sparse(engine: Any) -> Work:
    """Return (columns int32, weights float32) of each text."""
    return Work("sparse", lambda items: list(engine.encode(list(items))))


def score(engine: Any) -> Work:
    """Return the score of each (query, document)."""
    return Work("score", lambda items: engine.score(list(items)).tolist())


def classify(engine: Any) -> Work:
    """Return the labels of each input, the best first, with their scores."""

    def run(items: Sequence[Any]) -> list[Any]:
        names = engine.labels
        return [ranked_labels(row, names, None) for row in engine.scores(list(items))]

    return Work("classify", run)


def tag(engine: Any) -> Work:
    """Return the labelled parts of each text."""
    return Work("tag", lambda items: engine.tag(list(items)))


def similarity(vectors: Sequence[Any]) -> list[float]:
    """Return the cosines of the first vector with each of the others."""
    rows = np.stack([vector for vector, _ in vectors])
    return [float(x) for x in rows[1:] @ rows[0]]
