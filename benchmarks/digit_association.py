"""The second half of crossmodal.py: the same search through a store, with its association graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from memopt.memory import (
    AssociationGraph,
    Content,
    Filter,
    MemoryStore,
    MultimodalRetriever,
    NewMemory,
)

SPEAKERS = {"takes": "known", "takes of the new speaker": "new"}
SAMPLED = 60  # queries per direction that go through the store, with the graph and without


@dataclass(frozen=True)
class Part:
    """What is asked for or searched: contents, their joint vectors and their digits."""

    contents: list[Content]
    vectors: np.ndarray
    digits: np.ndarray


Space = dict[str, Part]


@dataclass(frozen=True)
class Associated:
    """The same direction through MultimodalRetriever, without and with the association graph."""

    direction: str
    speakers: str
    queries: int
    recall_1: tuple[float, float]
    recall_10: tuple[float, float]
    mean_ap: tuple[float, float]


def directions(takes: str, speakers: str) -> list[tuple[str, str, str, str]]:
    """Return (modality asked in, its part, modality searched, its part) of every direction."""
    names = {"vision": "pictures", "audio": takes, "text": "text"}
    return [
        (one, names[one], other, names[other])
        for one in names
        for other in names
        if one != other and (speakers == "known" or "audio" in (one, other))
    ]


def associate(
    space: Space, takes: str, speakers: str, home: Path, seed: int, advance: Callable[[], None]
) -> list[Associated]:
    """Keep everything in a store and ask MultimodalRetriever, without the graph and with it.

    What was seen, heard and read in one moment (the same digit) lies seconds apart, moments lie an
    hour apart: that is all the graph knows besides the vectors. Items that found no partner are
    moments of their own.
    """
    generator = np.random.default_rng(seed)
    names = {"vision": "pictures", "audio": takes, "text": "text"}
    memories, digit_of = [], {}
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    for offset, (kind, name) in enumerate(names.items()):
        part = space[name]
        met = np.zeros(10, int)
        for row in generator.permutation(len(part.digits)):
            digit = int(part.digits[row])
            moment = begin + timedelta(hours=10 * int(met[digit]) + digit, seconds=offset)
            met[digit] += 1
            key = f"{kind}-{row}"
            digit_of[key] = digit
            memories.append(
                NewMemory(
                    content=part.contents[row],
                    embedding=part.vectors[row],
                    timestamp=moment,
                    memory_id=key,
                )
            )
    found = []
    with MemoryStore(home, dim=space["text"].vectors.shape[1]) as store:
        graph = AssociationGraph(store)
        store.add(memories)
        graph.build()
        retriever = MultimodalRetriever(store, graph)
        for one, asked, other, searched in directions(takes, speakers):
            queries = space[asked]
            chosen = generator.permutation(len(queries.digits))[:SAMPLED]
            total = len(space[searched].digits)
            scores: list[tuple[float, float, float]] = []
            for enabled in (False, True):
                hits = []
                for row in chosen:
                    results = retriever.retrieve(
                        vector=queries.vectors[row],
                        top_k=total,
                        where=Filter(modality=other),
                        enable_association=enabled,
                        touch=False,
                    )
                    if len(results) != total:
                        raise SystemExit(f"{one} -> {other}: {len(results)} of {total} found")
                    ranked = [digit_of[result.memory.memory_id] for result in results]
                    hits.append(np.array(ranked) == queries.digits[row])
                scores.append(averages(np.array(hits)))
            pairs = list(zip(*scores, strict=True))
            found.append(Associated(f"{one} -> {other}", speakers, len(chosen), *pairs))
            advance()
    return found


def averages(right: np.ndarray) -> tuple[float, float, float]:
    """Return recall@1, recall@10 and mean average precision of ranked hits (queries, places)."""
    precision = right.cumsum(axis=1) / np.arange(1, right.shape[1] + 1)
    average = (precision * right).sum(axis=1) / np.maximum(right.sum(axis=1), 1)
    return (
        float(right[:, 0].mean()),
        float(right[:, :10].any(axis=1).mean()),
        float(average.mean()),
    )


def show_associated(console: Console, rows: list[Associated]) -> None:
    """Print what the association graph changes."""
    table = Table(title="through MultimodalRetriever: without -> with the association graph")
    for column in ("direction", "speakers", "queries", "recall@1", "recall@10", "mAP"):
        table.add_column(column)
    for row in rows:
        changes = [row.recall_1, row.recall_10, row.mean_ap]
        table.add_row(
            row.direction, row.speakers, str(row.queries),
            *(f"{before:.3f} -> {after:.3f}" for before, after in changes),
        )  # fmt: skip
    console.print(table)
