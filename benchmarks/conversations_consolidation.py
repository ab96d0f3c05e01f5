"""What consolidation saves of a long conversation, and what it still finds of the evidence.

    python benchmarks/conversations_consolidation.py [--data FILE] [--bundle DIR] [--json]

A turn counts as found when it is found itself, or in a summary that names it as a source and still
says its text: asked by vector and words together, and by words alone. Each dialogue is consolidated
twice by the default recipe: as it is (all of it is old) and with every turn read ten times (all of
it is hot). Every text is embedded once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from command_line import run_main
from conversations import BUNDLE, DATA, Dialogue, fill, read
from rich.console import Console
from rich.table import Table

from memopt.memory import (
    ConsolidationRecipe,
    Content,
    Memory,
    MemoryStore,
    TextEmbedder,
    TextEncoder,
    consolidate,
    reclaim,
)
from memopt.runtimes.engine import ArrowEngine

TOP_K = 10


class Once:
    """An embedder that embeds a text once."""

    def __init__(self, embedder: TextEmbedder) -> None:
        self.embedder, self.model_id, self.dim = embedder, embedder.model_id, embedder.dim
        self._known: dict[str | None, np.ndarray] = {}

    def embed(self, items: Sequence[Content]) -> np.ndarray:
        """Return float32 (n, dim)."""
        new = list({item.text: item for item in items if item.text not in self._known}.values())
        if new:
            vectors = self.embedder.embed(new)
            self._known.update(zip((item.text for item in new), vectors, strict=True))
        return np.stack([self._known[item.text] for item in items])


@dataclass(frozen=True)
class Row:
    """One consolidation of one dialogue; recall@10 before and after, bytes before and after."""

    dialogue: str
    kind: str
    summaries: int
    archived: int
    before: float
    after: float
    words_before: float
    words_after: float
    bytes_before: int
    bytes_after: int


def recall(store: MemoryStore, talk: Dialogue, *, by_vector: bool) -> float:
    """Return the mean share of a question's evidence among its first ten memories."""
    texts = dict(zip(talk.ids, talk.texts, strict=True))

    def says(memory: Memory, turn: str) -> bool:
        said = " ".join(texts[turn].split())
        stands = turn in memory.source_memory_ids and said in (memory.summary or "")
        return memory.memory_id == turn or stands

    shares = []
    for question, vector, evidence in zip(talk.questions, talk.asked, talk.evidence, strict=True):
        query = vector if by_vector else None
        hits = store.search(query, text=question, top_k=TOP_K, touch=False)
        found = [hit.memory for hit in hits]
        shares.append(np.mean([any(says(one, turn) for one in found) for turn in evidence]))
    return float(np.mean(shares))


def measure(talk: Dialogue, embedder: Once, *, hot: bool) -> Row:
    """Fill a store, consolidate it, ask it before and after."""
    with (
        tempfile.TemporaryDirectory() as folder,
        MemoryStore(folder, embedder=embedder, background=False) as store,
    ):
        fill(store, talk)
        if hot:
            store.touch(talk.ids * 10)
        reclaim(store)
        size = store.stats().bytes_on_disk or 0
        before = [recall(store, talk, by_vector=way) for way in (True, False)]
        report = consolidate(store, ConsolidationRecipe(duty=1))
        reclaim(store)
        left = store.stats().bytes_on_disk or 0
        after = [recall(store, talk, by_vector=way) for way in (True, False)]
    return Row(
        talk.name,
        "hot" if hot else "old",
        len(report.summaries),
        report.archived + report.condensed,
        before[0],
        after[0],
        before[1],
        after[1],
        size,
        left,
    )


def main() -> None:
    """Measure every dialogue, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    with ArrowEngine(options.bundle) as engine, Console(stderr=True).status("embedding") as status:
        encoder = TextEncoder(engine, engine.dimension)
        embedder = Once(TextEmbedder(encoder))
        for talk in read(options.data, encoder.encode, speaker=True):
            for hot in (False, True):
                status.update(f"{talk.name}, {'hot' if hot else 'old'}")
                rows.append(measure(talk, embedder, hot=hot))
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    table = Table(
        "dialogue",
        "turns are",
        "summaries",
        "archived",
        "R@10 before, after",
        "words alone",
        "saved",
    )
    for row in rows:
        table.add_row(
            row.dialogue,
            row.kind,
            str(row.summaries),
            str(row.archived),
            f"{row.before:.3f}, {row.after:.3f} ({row.after / row.before:.3f})",
            f"{row.words_before:.3f}, {row.words_after:.3f}",
            f"{1 - row.bytes_after / row.bytes_before:.0%}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    run_main(main)
