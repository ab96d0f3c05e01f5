"""What consolidation saves of a long conversation, and what it still finds of the evidence.

    .venv/bin/python benchmarks/conversations_consolidation.py ../shared/data/conversations.json

A turn counts as found when it is found itself, or in a summary that names it as a source and still
says its text. Each dialogue is consolidated twice by the default recipe: as it is (all of it is
old) and with every turn read ten times (all of it is hot).
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from memopt.memory.condense import ConsolidationRecipe, consolidate
from memopt.memory.encoders import TextEmbedder, TextEncoder
from memopt.memory.reclaim import reclaim
from memopt.memory.schema import Content, NewMemory
from memopt.memory.store import MemoryStore

TOP_K = 10


def recall(store: MemoryStore, talk: dict[str, Any], ids: dict[str, str]) -> float:
    """Mean share of the evidence turns of a question among its first ten memories."""
    texts = {turn["id"]: said(turn) for turn in talk["turns"]}
    shares = []
    for question in talk["questions"]:
        vector = store.embed([Content(text=question["question"])])[0]
        hits = store.search(vector, text=question["question"], top_k=TOP_K, touch=False)
        found = [hit.memory for hit in hits]
        shares.append(
            np.mean(
                [
                    any(
                        memory.memory_id == ids[turn]
                        or (
                            ids[turn] in memory.source_memory_ids
                            and texts[turn] in (memory.summary or "")
                        )
                        for memory in found
                    )
                    for turn in question["evidence"]
                ]
            )
        )
    return float(np.mean(shares))


def said(turn: dict[str, str]) -> str:
    return " ".join(f"{turn['speaker']}: {turn['text']}".split())


def measure(talk: dict[str, Any], embedder: TextEmbedder, *, hot: bool) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        MemoryStore(folder, embedder=embedder, background=False) as store,
    ):
        new = [
            NewMemory(
                content=Content(text=said(turn)), timestamp=datetime.fromisoformat(turn["time"])
            )
            for turn in talk["turns"]
        ]
        ids = dict(zip([turn["id"] for turn in talk["turns"]], store.add(new).ids, strict=True))
        if hot:
            store.touch(list(ids.values()) * 10)
        reclaim(store)
        size, before = store.stats().bytes_on_disk or 0, recall(store, talk, ids)
        report = consolidate(store, ConsolidationRecipe(duty=1))
        reclaim(store)
        left, after = store.stats().bytes_on_disk or 0, recall(store, talk, ids)
    print(
        f"{talk['id']:10} {'hot' if hot else 'old':4} {len(report.summaries):4} summaries "
        f"{report.archived:4} archived  R@10 {before:.3f} -> {after:.3f} ({after / before:.3f})  "
        f"bytes {size:,} -> {left:,} ({1 - left / size:.0%} saved)"
    )


if __name__ == "__main__":
    model = TextEmbedder(TextEncoder(Path(__file__).parents[1] / "models" / "minilm"))
    for conversation in json.loads(Path(sys.argv[1]).read_text()):
        for often in (False, True):
            measure(conversation, model, hot=often)
