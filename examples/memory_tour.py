"""A memory of 200 real texts, pictures and sounds: kept, found across senses, condensed.

    .venv/bin/python examples/memory_tour.py          (after make demo; offline, under 2 minutes)

Needs digits-written.parquet, digits-spoken.parquet and stsb-en-dev.csv in ../shared/data, which are
not part of this repository.

Handwritten digits are seen, spoken digits are heard, and sentences that mention a number are read,
all from ../shared/data. Two small encoders and the joint layer learn from one part of them; what is
remembered and asked are other pictures, takes and sentences.
"""

from __future__ import annotations

import asyncio
import csv
import re
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from crossmodal import LEARNT, WORDS, minilm
from digit_encoders import DATA, Digits, Pictures, Sounds, spoken, train, written

from memopt.joint.bundle import make_joint_bundle
from memopt.joint.layer import JointEmbeddingLayer
from memopt.joint.pairs import make_pairs
from memopt.joint.train import JointRecipe
from memopt.memory import (
    AssociationGraph,
    ConsolidationRecipe,
    ConsolidationWorker,
    Content,
    Filter,
    JointEmbedder,
    MemoryStore,
    MultimodalRetriever,
    NewMemory,
    TextEncoder,
    reclaim,
    verify,
)

KINDS = {"text": "read", "vision": "seen", "audio": "heard"}
KEPT = {"text": 60, "vision": 70, "audio": 70}
ASKED, PAIRS = 40, 1200
START = datetime(2026, 9, 1, 8, tzinfo=UTC)


def main() -> None:
    """Learn, remember, find, condense, find again."""
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is not there: run from the project's folder, beside those data")
    console = Console(width=None if Console().is_terminal else 110, highlight=False)
    begin = time.perf_counter()
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as work, console.status("") as status:
        console.rule("1. two encoders and the joint layer learn")
        parts = {kind: part.take(generator.permutation(len(part))) for kind, part in real().items()}
        kept = {kind: part.take(np.arange(KEPT[kind])) for kind, part in parts.items()}
        asked = {k: p.take(np.arange(KEPT[k], KEPT[k] + ASKED)) for k, p in parts.items()}
        learnt = {k: p.take(np.arange(KEPT[k] + ASKED, len(p))) for k, p in parts.items()}
        embedder = learn(learnt, Path(work) / "joint", generator, status.update)
        console.print(f"{embedder.model_id}: {time.perf_counter() - begin:.0f} s")

        console.rule("2. 200 things are read, seen and heard")
        now = [START]
        store = MemoryStore(Path(work) / "store", embedder=embedder, clock=lambda: now[0])
        graph = AssociationGraph(store)
        retriever = MultimodalRetriever(store, graph)
        truth = remember(store, kept, now)
        reclaim(store)
        console.print(
            f"{store.count()} memories, {store.stats().links:,} associations, "
            f"{store.stats().bytes_on_disk or 0:,} bytes"
        )

        console.rule("3. found from every sense")
        show_one(console, retriever, asked, truth)
        before = shares(retriever, asked, truth)

        console.rule("4. six weeks later: condensed")
        for word in WORDS * 10:
            retriever.retrieve(text=word, where=Filter(modality="text"), top_k=30)
        store.flush()
        now[0] += timedelta(days=42)
        reclaim(store)
        size = store.stats().bytes_on_disk or 0
        worker = ConsolidationWorker(store, ConsolidationRecipe(similarity=0.7, originals="drop"))
        planned = asyncio.run(worker.dry_run()).plan
        console.print(f"{planned.hot} often asked for, {planned.cold} old and seldom asked for")
        done = asyncio.run(worker.consolidate())
        reclaim(store)
        small = store.stats().bytes_on_disk or 0
        for key in done.summaries:
            memory = store.get(key)
            console.print(f"summary of {memory.source_count}: {memory.summary}")
        console.print(
            f"{done.condensed} memories became {len(done.summaries)} summaries, {done.archived} "
            f"went to the archive: {size:,} -> {small:,} bytes, {1 - small / size:.0%} saved"
        )
        for key in done.summaries:
            said = {truth[source] for source in store.get(key).source_memory_ids}
            truth[key] = said.pop() if len(said) == 1 else -1
        after = shares(retriever, asked, truth)
        show_shares(console, before, after)
        report = verify(store)
        console.print(f"verify: {report.memories} memories, problems: {report.problems or 'none'}")
        store.close()
    console.print(f"{time.perf_counter() - begin:.0f} s")


def real() -> dict[str, Digits]:
    """Pictures, takes of the speakers, and sentences that mention exactly one number word."""
    words = re.compile(rf"\b({'|'.join(WORDS)})\b", re.IGNORECASE)
    found: dict[str, int] = {}
    with (DATA / "stsb-en-dev.csv").open(encoding="utf-8", newline="") as lines:
        for row in csv.reader(lines):
            for sentence in row[:2]:
                numbers = {word.lower() for word in words.findall(sentence)}
                # "One" is mostly no number but a pronoun.
                if len(numbers) == 1 and numbers != {"one"}:
                    found[sentence] = WORDS.index(numbers.pop())
    texts = Digits([text.encode() for text in found], np.array(list(found.values())))
    return {"text": texts, "vision": written(), "audio": spoken()}


def learn(
    parts: dict[str, Digits], folder: Path, generator: np.random.Generator, say
) -> JointEmbedder:  # type: ignore[no-untyped-def]
    """Train both encoders to name digits, and the joint layer on moments of all three senses."""
    say("encoder of pictures")
    vision = train(Pictures(), parts["vision"], 6, lambda: None)
    say("encoder of sounds")
    audio = train(Sounds(), parts["audio"], 14, lambda: None)
    text = TextEncoder(minilm(), device="cpu", variant="onnx-fp32")
    say("joint layer")
    phrases = [line.format(word) for word in WORDS for line in LEARNT]
    phrases += [item.decode() for item in parts["text"].items]
    vectors = {
        "vision": vision.encode_varied(parts["vision"].items),
        "audio": audio.encode_varied(parts["audio"].items),
        "text": text.encode(phrases),
    }
    labels = {
        "vision": parts["vision"].digits,
        "audio": parts["audio"].digits,
        "text": np.r_[np.repeat(np.arange(10), len(LEARNT)), parts["text"].digits],
    }
    digits = generator.integers(0, 10, PAIRS)
    moments = {
        kind: vectors[kind][
            [generator.choice(np.flatnonzero(labels[kind] == digit)) for digit in digits]
        ]
        for kind in KINDS
    }
    bundle = make_joint_bundle(
        make_pairs(moments, group=digits),
        folder,
        recipe=JointRecipe(epochs=5, batch_size=128, learning_rate=1e-3),
        encoders={"vision": vision.model_id, "audio": audio.model_id, "text": text.model_id},
    )
    return JointEmbedder(JointEmbeddingLayer(bundle), vision=vision, audio=audio, text=text)


def content(kind: str, item: bytes) -> Content:
    """What the memory is given."""
    return Content(text=item.decode()) if kind == "text" else Content(**{kind: item})


def remember(store: MemoryStore, kept: dict[str, Digits], now: list[datetime]) -> dict[str, int]:
    """Add everything, a minute apart; return id -> digit."""
    truth = {}
    for kind, part in kept.items():
        new = []
        for item in part.items:
            now[0] += timedelta(minutes=1)
            new.append(
                NewMemory(content=content(kind, item), category=KINDS[kind], timestamp=now[0])
            )
        truth |= dict(zip(store.add(new).ids, part.digits.tolist(), strict=True))
    return truth


def shares(
    retriever: MultimodalRetriever, asked: dict[str, Digits], truth: dict[str, int]
) -> dict[tuple[str, str], float]:
    """Share of queries, of those with a partner, whose first answer is the right digit."""
    found = {}
    there = {other: digits_of(retriever.store, other, truth) for other in KINDS}
    for kind, part in asked.items():
        for other in [name for name in KINDS if name != kind]:
            right = count = 0
            for item, digit in zip(part.items, part.digits, strict=True):
                if digit not in there[other]:
                    continue
                count += 1
                query = {kind: item.decode() if kind == "text" else item}
                first = retriever.retrieve(
                    **query, where=Filter(modality=other), top_k=1, touch=False
                )
                right += bool(first) and truth[first[0].memory.memory_id] == digit
            found[KINDS[kind], KINDS[other]] = right / count
    return found


def digits_of(store: MemoryStore, kind: str, truth: dict[str, int]) -> set[int]:
    """Digits that are remembered in this sense."""
    batches = store.scan(Filter(modality=kind), ["memory_id"])
    return {truth[key] for batch in batches for key in batch["memory_id"].to_pylist()}


def show_one(
    console: Console,
    retriever: MultimodalRetriever,
    asked: dict[str, Digits],
    truth: dict[str, int],
) -> None:
    """Print what one sentence, one picture and one sound find in the other senses."""
    table = Table("asked", "of", "found", "of", "similarity", "association", "score")
    for kind, part in asked.items():
        item, digit = part.items[0], part.digits[0]
        for other in [name for name in KINDS if name != kind]:
            query = {kind: item.decode() if kind == "text" else item}
            for result in retriever.retrieve(
                **query, where=Filter(modality=other), top_k=2, touch=False
            ):
                table.add_row(
                    query["text"][:40] if kind == "text" else KINDS[kind],
                    str(digit),
                    (result.memory.text or KINDS[other])[:40],
                    str(truth[result.memory.memory_id]),
                    f"{result.similarity:.2f}",
                    f"{result.association_score:.2f}",
                    f"{result.final_score:.2f}",
                )
    console.print(table)


def show_shares(
    console: Console, before: dict[tuple[str, str], float], after: dict[tuple[str, str], float]
) -> None:
    """Print how often the first answer is the right digit, before and after condensing."""
    table = Table("from", "to", "first is right", "after condensing", "chance")
    for (one, other), share in sorted(before.items()):
        table.add_row(one, other, f"{share:.0%}", f"{after[one, other]:.0%}", "10 %")
    console.print(table)


if __name__ == "__main__":
    main()
