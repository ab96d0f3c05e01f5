"""Processes of the fault tests: ``python memory_worker.py ROLE FOLDER SEED``; says what is done."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np

from memopt.errors import ConsolidationError
from memopt.memory.graph.association import AssociationGraph
from memopt.memory.graph.retriever import MultimodalRetriever
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory

DIM = 16


def memories(first: int, count: int, seed: int) -> list[NewMemory]:
    """Texts of a writer with vectors in a few clusters."""
    generator = np.random.default_rng([seed, first])
    centres = np.random.default_rng(0).normal(size=(20, DIM))
    vectors = centres[generator.integers(0, 20, count)] + 0.3 * generator.normal(size=(count, DIM))
    return [
        NewMemory(content=Content(text=f"writer {seed} note {at}"), embedding=v)
        for at, v in enumerate(vectors, first)
    ]


def say(*words: object) -> None:
    """Print one whole line at once."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def write(store: MemoryStore, seed: int) -> None:
    """Add and delete without end."""
    AssociationGraph(store)
    first = 0
    while True:
        ids = store.add(memories(first, 16, seed)).ids
        say("added", *ids)
        if first % 64 == 0:
            say("deleting", *ids[:4])
            store.delete(ids[:4])
        first += 16
        if first % 512 == 0:
            store.optimize()
            store.index.ensure()


def read(store: MemoryStore, seed: int) -> None:
    """Search without end; every answer must be whole."""
    retriever = MultimodalRetriever(store, AssociationGraph(store))
    generator = np.random.default_rng(seed)
    while True:
        found = retriever.retrieve(vector=generator.normal(size=DIM), top_k=5)
        scores = [result.final_score for result in found]
        texts = [result.memory.text or "" for result in found]
        if scores != sorted(scores, reverse=True) or not all(t.startswith("writer") for t in texts):
            raise SystemExit(f"a broken answer: {scores} {texts}")
        say("found", len(found))


def build(store: MemoryStore, seed: int) -> None:
    """Add enough for an index, then build it again and again."""
    say("added", *store.add(memories(0, 6000, seed)).ids)
    while True:
        say("building")
        store.index.ensure(rebuild=True)


def fill(store: MemoryStore, seed: int) -> None:
    """Add until the disk is full; that is told in one line."""
    AssociationGraph(store)
    for first in range(0, 1_000_000, 32):
        long = [
            replace(m, content=Content(text=f"{m.content.text} " + "and so on " * 400))
            for m in memories(first, 32, seed)
        ]
        try:
            say("added", *store.add(long).ids)
        except ConsolidationError as error:
            say("full", error)
            return


if __name__ == "__main__":
    with MemoryStore(sys.argv[2], dim=DIM) as opened:
        {"write": write, "read": read, "build": build, "fill": fill}[sys.argv[1]](
            opened, int(sys.argv[3])
        )
