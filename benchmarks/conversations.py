"""What a memory of long conversations finds: evidence recall@5 and @10, beside numpy and BM25.

    python benchmarks/conversations.py [--data FILE] [--bundle DIR] [--no-speaker] [--json]

The file holds dialogues: ``turns`` (id, speaker, text, time) and ``questions`` whose ``evidence``
names the turns that answer them. A turn is one memory, "speaker: text" with its time; a dialogue is
one store, filled in the order of time, and its questions are asked one by one. The recall of a
question is the share of its evidence among the first k; what is printed is the mean over questions.
No language model, and nothing is trained on the dialogues.

Peers, in the same run with the same vectors: numpy cosine, BM25 over plain words (k1 1.2, b 0.75),
and their reciprocal-rank fusion (k 60). Speed of a retrieval at 100,000 memories:
``benchmarks/memory.py``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from command_line import run_main
from rich.console import Console
from rich.table import Table

from memopt.benchmark.record import hardware
from memopt.memory import (
    AssociationGraph,
    Content,
    MemoryStore,
    MultimodalRetriever,
    NewMemory,
    TextEmbedder,
    TextEncoder,
)
from memopt.runtimes.engine import ArrowEngine

DATA = Path(__file__).parents[2] / "shared" / "data" / "conversations.json"
BUNDLE = Path(__file__).parents[1] / "models" / "minilm"
DEPTHS = (5, 10)
_K1, _B, _RRF_K = 1.2, 0.75, 60

# A way to answer: (question, its vector) -> ids of turns, best first, max(DEPTHS) of them.
Ask = Callable[[str, np.ndarray], Sequence[str]]


@dataclass(frozen=True)
class Dialogue:
    """One conversation with the vectors of its turns and questions, float32 (n, dim)."""

    name: str
    ids: list[str]
    texts: list[str]
    times: list[datetime]
    vectors: np.ndarray
    questions: list[str]
    evidence: list[set[str]]
    asked: np.ndarray


@dataclass(frozen=True)
class Row:
    """Recall of one way over the questions of one dialogue, or of all."""

    dialogue: str
    what: str
    questions: int
    recall_5: float
    recall_10: float


def read(path: Path, encode: Callable[[list[str]], np.ndarray], speaker: bool) -> list[Dialogue]:
    """Read the dialogues and embed what is in them."""
    dialogues = []
    for one in json.loads(path.read_text(encoding="utf-8")):
        turns, questions = one["turns"], [q for q in one["questions"] if q["evidence"]]
        texts = [
            f"{turn['speaker']}: {turn['text']}" if speaker else turn["text"] for turn in turns
        ]
        asked = [question["question"] for question in questions]
        dialogues.append(
            Dialogue(
                name=one["id"],
                ids=[turn["id"] for turn in turns],
                texts=texts,
                times=[datetime.fromisoformat(turn["time"]) for turn in turns],
                vectors=encode(texts),
                questions=asked,
                evidence=[set(question["evidence"]) for question in questions],
                asked=encode(asked),
            )
        )
    return dialogues


def bm25(texts: list[str]) -> Callable[[str], np.ndarray]:
    """Return question -> scores (n,): Okapi BM25 over lower-case words, nothing left out."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    lengths = np.array([sum(count.values()) for count in counts])
    norm = _K1 * (1 - _B + _B * lengths / lengths.mean())
    postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for at, count in enumerate(counts):
        for word, times in count.items():
            postings[word].append((at, times))

    def scores(question: str) -> np.ndarray:
        found = np.zeros(len(texts))
        for word in re.findall(r"\w+", question.lower()):
            held = postings.get(word, [])
            idf = np.log(1 + (len(texts) - len(held) + 0.5) / (len(held) + 0.5))
            for at, times in held:
                found[at] += idf * times * (_K1 + 1) / (times + norm[at])
        return found

    return scores


def peers(dialogue: Dialogue) -> dict[str, Ask]:
    """Return what anybody would write in a few lines."""
    words = bm25(dialogue.texts)

    def best(scores: np.ndarray) -> list[str]:
        order = np.argsort(-scores, kind="stable")[: max(DEPTHS)]
        return [dialogue.ids[at] for at in order]

    def fused(question: str, vector: np.ndarray) -> list[str]:
        total = np.zeros(len(dialogue.ids))
        for scores in (dialogue.vectors @ vector, words(question)):
            ranks = np.empty(len(scores))
            ranks[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
            total += 1 / (_RRF_K + 1 + ranks)
        return best(total)

    return {
        "numpy cosine": lambda _, vector: best(dialogue.vectors @ vector),
        "BM25": lambda question, _: best(words(question)),
        "reciprocal-rank fusion of both": fused,
    }


def fill(store: MemoryStore, dialogue: Dialogue) -> None:
    """Add every turn, under its own id."""
    rows = zip(dialogue.ids, dialogue.texts, dialogue.times, dialogue.vectors, strict=True)
    store.add(
        [
            NewMemory(content=Content(text=text), embedding=vector, memory_id=key, timestamp=when)
            for key, text, when, vector in rows
        ]
    )


def ours(store: MemoryStore, graph: AssociationGraph) -> dict[str, Ask]:
    """Return the ways a store is asked; ``retrieve`` is what the library and the CLI do."""
    retriever = MultimodalRetriever(store, graph)
    most = max(DEPTHS)

    def words(question: str, _: np.ndarray) -> list[str]:
        hits = store.search(text=question, top_k=most, touch=False)
        return [hit.memory.memory_id for hit in hits]

    def search(question: str, vector: np.ndarray) -> list[str]:
        hits = store.search(vector, text=question, top_k=most, touch=False)
        return [hit.memory.memory_id for hit in hits]

    def retrieve(question: str, _: np.ndarray) -> list[str]:
        found = retriever.retrieve(text=question, top_k=most, touch=False)
        return [one.memory.memory_id for one in found]

    return {
        "store.search(text=...)": words,
        "store.search(vector, text=...)": search,
        "retriever.retrieve(text)": retrieve,
    }


def measured(dialogue: Dialogue, what: str, ask: Ask) -> Row:
    """Ask every question of the dialogue one way."""
    shares = []
    for question, vector, wanted in zip(
        dialogue.questions, dialogue.asked, dialogue.evidence, strict=True
    ):
        found = list(ask(question, vector))
        shares.append([len(wanted.intersection(found[:depth])) / len(wanted) for depth in DEPTHS])
    at_5, at_10 = np.mean(shares, axis=0).tolist()
    return Row(dialogue.name, what, len(shares), at_5, at_10)


def measure(dialogue: Dialogue, embedder: TextEmbedder, folder: Path) -> list[Row]:
    """Fill a store with the dialogue and ask it and its peers."""
    rows = [measured(dialogue, what, ask) for what, ask in peers(dialogue).items()]
    with MemoryStore(folder, embedder=embedder, background=False) as store:
        graph = AssociationGraph(store)
        fill(store, dialogue)
        store.optimize()
        rows += [measured(dialogue, what, ask) for what, ask in ours(store, graph).items()]
    return rows


def totals(rows: Sequence[Row]) -> list[Row]:
    """Return the mean over all questions of each way, in the order of the first dialogue."""
    found = []
    for what in dict.fromkeys(row.what for row in rows):
        same = [row for row in rows if row.what == what]
        count = [row.questions for row in same]
        at_5 = float(np.average([row.recall_5 for row in same], weights=count))
        at_10 = float(np.average([row.recall_10 for row in same], weights=count))
        found.append(Row("all", what, sum(count), at_5, at_10))
    return found


def _show(rows: Sequence[Row], console: Console) -> None:
    names = list(dict.fromkeys(row.dialogue for row in rows))
    table = Table("R@5 / R@10", *names, title="evidence recall")
    for what in dict.fromkeys(row.what for row in rows):
        by_name = {row.dialogue: row for row in rows if row.what == what}
        cells = [f"{by_name[n].recall_5:.3f} / {by_name[n].recall_10:.3f}" for n in names]
        table.add_row(what, *cells)
    console.print(table)


def main() -> None:
    """Measure every dialogue, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--no-speaker", action="store_true", help="memories of the text alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: list[Row] = []
    folder = Path(tempfile.mkdtemp())
    try:
        with (
            ArrowEngine(options.bundle) as engine,
            Console(stderr=True).status("embedding") as status,
        ):
            encoder = TextEncoder(engine, engine.dimension)
            dialogues = read(options.data, encoder.encode, not options.no_speaker)
            for dialogue in dialogues:
                status.update(f"{dialogue.name}: {len(dialogue.questions)} questions")
                rows += measure(dialogue, TextEmbedder(encoder), folder / dialogue.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows += totals(rows)
    if options.json:
        answer: dict[str, Any] = {"hardware": str(hardware()), "rows": [asdict(r) for r in rows]}
        print(json.dumps(answer, indent=1))
        return
    _show(rows, Console(width=140))


if __name__ == "__main__":
    run_main(main)
