"""The memory store from 1k to 100k (1M) memories: speed, recall, size, saving by consolidation.

    python benchmarks/memory.py [--sizes 1000 10000 100000] [--large] [--json] [--output FILE.html]
    python benchmarks/memory.py --texts [--sizes 100000]    # only questions of words

768 dimensions, clustered vectors, queries near stored ones. Recall is against exact search of the
same vectors; numpy (one matrix product) and usearch (HNSW, cosine, float32) answer the same queries
in the same run. Consolidation: groups of notes that repeat one fact in other words, each fact asked
for before and after; a question counts as answered when the fact's own word is in the first 5. The
time of a consolidation is that of its work, without the pauses it leaves to searches.

Questions of words: memories of two sentences each, said by somebody, of ../shared/data (STS-B and
three long dialogues) with real MiniLM vectors (the middle of the two sentences'), asked what those
dialogues are asked: words, vector and neighbours together. Beside the time that passes is the
processor's, since the machine may be shared; encoding a question is a row of its own.

One at a time: an agent's day, each memory a commit with its links; searches right afterwards, and
nothing is tidied by hand.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import usearch.index
from command_line import positive_int, run_main
from line_chart import lines
from rich.console import Console
from rich.table import Table

from memopt.benchmark.record import hardware
from memopt.files import atomic_path
from memopt.memory import (
    AssociationGraph,
    ConsolidationRecipe,
    Content,
    MemoryStore,
    MultimodalRetriever,
    NewMemory,
    consolidate,
    reclaim,
)
from memopt.pages import page
from memopt.pages import table as html_table
from memopt.runtimes.engine import ArrowEngine

DIM = 768
DATA = Path(__file__).parents[2] / "shared" / "data"
BUNDLE = Path(__file__).parents[1] / "models" / "minilm"
QUERIES = 200
START = datetime(2026, 1, 1, tzinfo=UTC)


def clustered(count: int, generator: np.random.Generator) -> np.ndarray:
    """Unit vectors around count / 50 centres, cosine 0.75 to their centre on average."""
    centres = generator.normal(size=(max(2, count // 50), DIM)).astype(np.float32)
    rows = centres[generator.integers(0, len(centres), count)]
    for start in range(0, count, 8192):  # a million rows at once would be copied several times
        part = rows[start : start + 8192]
        part += 0.9 * generator.normal(size=part.shape).astype(np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """Median and 95th percentile in ms."""
    low, high = np.percentile(seconds, [50, 95]) * 1000
    return float(low), float(high)


def timed(search: Any, queries: np.ndarray) -> tuple[list[set[str]], list[float]]:
    """Answers and seconds of each query."""
    answers, seconds = [], []
    for query in queries:
        begin = time.perf_counter()
        found = search(query)
        seconds.append(time.perf_counter() - begin)
        answers.append(set(found))
    return answers, seconds


def measure(count: int, folder: Path) -> list[dict[str, Any]]:
    """Fill a store and ask it, numpy and usearch."""
    generator = np.random.default_rng(0)
    vectors = clustered(count, generator)
    picked = vectors[generator.integers(0, count, QUERIES)]
    queries = picked + 0.4 / DIM**0.5 * generator.normal(size=picked.shape).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    names = [f"m{at:07}" for at in range(count)]
    times = [START + timedelta(seconds=90 * at) for at in range(count)]
    with MemoryStore(folder / "store", dim=DIM, background=False) as store:
        begin = time.perf_counter()
        for start in range(0, count, 8192):
            part = slice(start, start + 8192)
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors[part].ravel()), DIM)
            texts = [f"note {name}" for name in names[part]]
            store.add_arrow(
                pa.table(
                    {
                        "memory_id": names[part],
                        "text": texts,
                        "joint_embedding": column,
                        "timestamp": times[part],
                    }
                )
            )
        added = count / (time.perf_counter() - begin)
        begin = time.perf_counter()
        state = store.index.ensure()
        built = time.perf_counter() - begin
        graph = AssociationGraph(store)
        begin = time.perf_counter()
        links = graph.build()
        linked = time.perf_counter() - begin
        reclaim(store)
        retriever = MultimodalRetriever(store, graph)

        def retrieve(query: np.ndarray) -> list[str]:
            found = retriever.retrieve(vector=query, touch=False)
            return [result.memory.memory_id for result in found]

        def without(query: np.ndarray) -> list[str]:
            found = retriever.retrieve(vector=query, touch=False, enable_association=False)
            return [result.memory.memory_id for result in found]

        def nearest(query: np.ndarray) -> list[str]:
            return [key for key, _ in store.candidates(query, top_k=10)]

        graph.links.read()
        for query in queries[:20]:
            retrieve(query)
        _, with_graph = timed(retrieve, queries)
        alone, without_graph = timed(without, queries)
        ours, plain = timed(nearest, queries)
        size = sum(p.stat().st_size for p in (folder / "store").rglob("*") if p.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def exact(query: np.ndarray) -> list[str]:
        scores = vectors @ query
        best = np.argpartition(-scores, 10)[:10]
        return [names[at] for at in best]

    right, of_numpy = timed(exact, queries)
    begin = time.perf_counter()
    peer = usearch.index.Index(ndim=DIM, metric="cos", dtype="f32")
    peer.add(np.arange(count), vectors)
    peer_added = count / (time.perf_counter() - begin)
    theirs, of_peer = timed(lambda q: [names[int(k)] for k in peer.search(q, 10).keys], queries)

    def recall(found: list[set[str]]) -> float:
        return float(np.mean([len(a & b) / 10 for a, b in zip(found, right, strict=True)]))

    shared = {"memories": count, "peak_rss_mb": peak}
    return [
        {
            **shared, "what": "memopt retrieve, with graph", "add_per_s": added,
            "p50_ms": percentiles(with_graph)[0], "p95_ms": percentiles(with_graph)[1],
            "bytes_per_memory": size / count, "index_s": built, "graph_s": linked, "links": links,
        },
        {
            **shared, "what": "memopt retrieve, without graph",
            "p50_ms": percentiles(without_graph)[0], "p95_ms": percentiles(without_graph)[1],
            "recall": recall(alone),
        },
        {
            **shared, "what": "memopt nearest", "add_per_s": added,
            "p50_ms": percentiles(plain)[0], "p95_ms": percentiles(plain)[1],
            "recall": recall(ours), "bytes_per_memory": size / count,
            "index": f"{state.nprobes} of {state.cells} cells" if state else "exact",
        },
        {
            **shared, "what": "numpy, exact", "p50_ms": percentiles(of_numpy)[0],
            "p95_ms": percentiles(of_numpy)[1], "recall": 1.0, "bytes_per_memory": 4.0 * DIM,
        },
        {
            **shared, "what": "usearch HNSW", "add_per_s": peer_added,
            "p50_ms": percentiles(of_peer)[0], "p95_ms": percentiles(of_peer)[1],
            "recall": recall(theirs),
            "bytes_per_memory": len(peer.save()) / count,
        },
    ]  # fmt: skip


def spoken(generator: np.random.Generator, count: int) -> tuple[list[str], np.ndarray, list[str]]:
    """Return ``count`` texts, their vectors, float32 (count, 384), and questions to ask."""
    talks = json.loads((DATA / "conversations.json").read_text(encoding="utf-8"))
    with (DATA / "stsb-en-dev.csv").open(encoding="utf-8", newline="") as file:
        said = [sentence for row in csv.reader(file) for sentence in row[:2]]
    said += [turn["text"] for talk in talks for turn in talk["turns"]]
    said = list(dict.fromkeys(sentence for sentence in said if sentence.strip()))
    speakers = sorted({turn["speaker"] for talk in talks for turn in talk["turns"]})
    with ArrowEngine(BUNDLE) as engine:
        known = engine.encode(said)
    first, second = generator.integers(0, len(said), (2, count))
    vectors = known[first] + known[second]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    who = generator.integers(0, len(speakers), count)
    texts = [
        f"{speakers[name]}: {said[one]} {said[other]}"
        for name, one, other in zip(who, first, second, strict=True)
    ]
    questions = [asked["question"] for talk in talks for asked in talk["questions"]]
    return texts, vectors, questions


def measure_texts(count: int, place: Path) -> list[dict[str, Any]]:
    """Ask a store of real sentences by text, two ways and with and without association."""
    texts, vectors, questions = spoken(np.random.default_rng(3), count)
    questions = questions[:: max(1, len(questions) // QUERIES)][:QUERIES]
    with (
        ArrowEngine(BUNDLE) as engine,
        MemoryStore(place, dim=vectors.shape[1], background=False) as store,
    ):
        for start in range(0, count, 8192):
            part = slice(start, start + 8192)
            rows = vectors[part]
            column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
            moments = [START + timedelta(seconds=90 * (start + at)) for at in range(len(rows))]
            store.add_arrow(
                pa.table({"text": texts[part], "joint_embedding": column, "timestamp": moments})
            )
        store.index.ensure()
        graph = AssociationGraph(store)
        graph.build()
        reclaim(store)
        graph.links.read()
        retriever = MultimodalRetriever(store, graph)
        asked = {question: engine.encode([question])[0] for question in questions}
        ways: dict[str, Callable[[str], Any]] = {
            "encode a question": lambda question: engine.encode([question]),
            "retrieve(text)": lambda question: retriever.retrieve(
                text=question, vector=asked[question], touch=False
            ),
            "retrieve(text), no association": lambda question: retriever.retrieve(
                text=question, vector=asked[question], touch=False, enable_association=False
            ),
            "search(vector, text)": lambda question: store.search(
                asked[question], text=question, touch=False
            ),
            "search(vector)": lambda question: store.search(asked[question], touch=False),
        }
        return [
            {"memories": count, "what": what, **_both_clocks(way, questions)}
            for what, way in ways.items()
        ]


def _both_clocks(way: Callable[[str], Any], questions: list[str]) -> dict[str, float]:
    """Return medians and 95th percentiles in ms, of the time and of the processor's time."""
    for question in questions[:20]:
        way(question)
    passed, worked = [], []
    for question in questions:
        begin, used = time.perf_counter(), time.process_time()
        way(question)
        worked.append(time.process_time() - used)
        passed.append(time.perf_counter() - begin)
    (median, high), (cpu, most) = percentiles(passed), percentiles(worked)
    return {"p50_ms": median, "p95_ms": high, "cpu_p50_ms": cpu, "cpu_p95_ms": most}


class Searches:
    """Searches on and on, with pauses of 5 ms, as an agent beside the consolidation would."""

    def __init__(self, retriever: MultimodalRetriever, queries: np.ndarray) -> None:
        self.retriever, self.queries = retriever, queries
        self.seconds: list[float] = []

    def p95(self, least: int, meanwhile: Future[Any] | None = None) -> float:
        """Return the 95th percentile in ms of ``least`` searches, or of all until that is done."""
        self.seconds = []
        while len(self.seconds) < least or (meanwhile is not None and not meanwhile.done()):
            query = self.queries[len(self.seconds) % len(self.queries)]
            begin = time.perf_counter()
            self.retriever.retrieve(vector=query, top_k=5, touch=False)
            self.seconds.append(time.perf_counter() - begin)
            time.sleep(0.005)
        return percentiles(self.seconds)[1]


def one_at_a_time(count: int, place: Path) -> dict[str, Any]:
    """Add memories one by one; what a search and a memory cost then."""
    vectors = clustered(count, np.random.default_rng(2))
    with MemoryStore(place, dim=DIM) as store:
        retriever = MultimodalRetriever(store, AssociationGraph(store))
        begin = time.perf_counter()
        for at, vector in enumerate(vectors):
            content = Content(text=f"note {at} of the day")
            moment = START + timedelta(seconds=90 * at)
            store.add(NewMemory(content=content, embedding=vector, timestamp=moment))
        added = count / (time.perf_counter() - begin)
        _, seconds = timed(
            lambda q: [r.memory.memory_id for r in retriever.retrieve(vector=q, touch=False)],
            vectors[:QUERIES],
        )
        sizes = [p.stat().st_size for p in place.rglob("*") if p.is_file()]
    median, high = percentiles(seconds)
    return {
        "memories": count,
        "add_per_s": added,
        "p50_ms": median,
        "p95_ms": high,
        "bytes_per_memory": sum(sizes) / count,
        "files": len(sizes),
    }


VERBS = ["keeps", "left", "put", "stores", "hid"]
ENDINGS = ["as always", "again today", "so nobody trips", "said twice", "before lunch", "(note)"]


def notes(facts: int, repeats: int, centres: np.ndarray, generator: np.random.Generator) -> Any:
    """Yield each fact ``repeats`` times in other words, a minute apart."""
    for fact in range(facts):
        for at in range(repeats):
            text = (
                f"Person {fact} {VERBS[at % 5]} the thing{fact}word in room {fact * 7}, "
                f"{ENDINGS[at % 6]}. It was mentioned in passing while we talked about "
                f"the weather, the garden and what else there is to do this week."
            )
            vector = centres[fact] + 0.35 * generator.normal(size=DIM)
            pixels = generator.integers(0, 256, 600, dtype=np.uint8).tobytes()
            yield NewMemory(
                content=Content(text=f"{text} {pixels.hex()[:400]}"),
                embedding=vector.astype(np.float32),
                category=f"topic {fact % 6}",
                memory_id=f"f{fact}-{at}",
                timestamp=START + timedelta(minutes=fact * 60 + at),
            )


def answered(retriever: MultimodalRetriever, centres: np.ndarray) -> float:
    """Return the share of facts, of at most 500, whose own word is in the first 5 results."""
    asked = range(0, len(centres), -(-len(centres) // 500))
    right = 0
    for fact in asked:
        found = retriever.retrieve(vector=centres[fact], top_k=5, touch=False)
        texts = [f"{r.memory.text or ''} {r.memory.summary or ''}" for r in found]
        right += any(f"thing{fact}word" in text for text in texts)
    return right / len(asked)


def consolidation(
    place: Path, facts: int, originals: str, repeats: int = 20, beside_s: float = 60
) -> dict[str, Any]:
    """Facts told again and again, condensed; what stays, and what is still found.

    The first minute runs as beside an agent (a small share of the time, while searches go on),
    the rest at full speed.
    """
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(facts, DIM))
    with MemoryStore(place, dim=DIM, clock=lambda: START, background=False) as store:
        ids = store.add(notes(facts, repeats, centres, generator)).ids
        graph = AssociationGraph(store)
        graph.build()
        for _ in range(10):
            store.touch(ids)
        store.flush()
        reclaim(store)
        before = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
        store.index.ensure()
        retriever = MultimodalRetriever(store, graph)
        evidence = answered(retriever, centres)
        store.optimize()
        graph.links.read()
        searches = Searches(retriever, centres)
        idle = searches.p95(QUERIES)
        recipe = ConsolidationRecipe(originals=originals)
        enough = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(consolidate, store, recipe, stop=enough)
            threading.Timer(beside_s, enough.set).start()
            busy = searches.p95(0, run)
        parts = [run.result()]
        work = parts[0].seconds * recipe.duty
        if parts[0].stopped:
            parts.append(consolidate(store, replace(recipe, duty=1.0)))
            work += parts[1].seconds
        reclaim(store)
        after = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
        return {
            "originals": originals,
            "memories": len(ids),
            "summaries": sum(len(part.summaries) for part in parts),
            "condensed": sum(part.condensed for part in parts),
            "work_s": work,
            "p95_idle": idle,
            "p95_meanwhile": busy,
            "bytes_before": before,
            "bytes_after": after,
            "saved": 1 - after / before,
            "evidence_before": evidence,
            "evidence_after": answered(retriever, centres),
        }


def main() -> None:
    """Measure, print tables, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=positive_int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--large", action="store_true", help="also 1,000,000 (12 GB of memory)")
    parser.add_argument("--texts", action="store_true", help="questions of words only")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, help="an HTML page with a chart")
    options = parser.parse_args()
    sizes = options.sizes + ([1_000_000] if options.large else [])
    folder = Path(tempfile.mkdtemp())
    rows: list[dict[str, Any]] = []
    worded: list[dict[str, Any]] = []
    singles: dict[str, Any] = {}
    condensed: list[dict[str, Any]] = []
    try:
        with Console(stderr=True).status("measuring") as status:
            for size in sizes if DATA.is_dir() and BUNDLE.is_dir() else ():
                status.update(f"{size:,} memories of sentences")
                worded += measure_texts(size, folder / "texts")
                shutil.rmtree(folder / "texts")
            for size in () if options.texts else sizes:
                status.update(f"{size:,} memories")
                rows += measure(size, folder / str(size))
                shutil.rmtree(folder / str(size))
            if not options.texts:
                status.update("1,000 memories, one at a time")
                singles = one_at_a_time(1000, folder / "singles")
                shutil.rmtree(folder / "singles")
                cases = [(120, "archive"), (120, "drop")]
                # A fact is told 20 times; a million of them would take an hour.
                cases += [(size // 20, "drop") for size in sizes if 2_400 < size <= 100_000]
                for facts, originals in cases:
                    status.update(f"consolidation of {20 * facts:,} memories")
                    condensed.append(consolidation(folder / "condensed", facts, originals))
                    shutil.rmtree(folder / "condensed")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        answer = {
            "search": rows,
            "texts": worded,
            "one_at_a_time": singles,
            "consolidation": condensed,
        }
        print(json.dumps(answer, indent=1))
        return
    columns = {
        "memories": "{:,}", "what": "{}", "add_per_s": "{:,.0f}", "p50_ms": "{:.2f}",
        "p95_ms": "{:.2f}", "recall": "{:.3f}", "bytes_per_memory": "{:,.0f}",
        "index_s": "{:.1f}", "graph_s": "{:.1f}", "links": "{:,}", "index": "{}",
        "peak_rss_mb": "{:,.0f}", "cpu_p50_ms": "{:.1f}", "cpu_p95_ms": "{:.1f}",
    }  # fmt: skip
    console = Console(width=170)
    console.print("Questions of words:", _table(worded, columns))
    if options.texts:
        return
    console.print(_table(rows, columns))
    console.print("One at a time:", _table([singles], columns | {"files": "{:,}"}))
    kinds = {
        "originals": "{}", "memories": "{:,}", "summaries": "{}", "condensed": "{:,}",
        "work_s": "{:.1f}", "p95_idle": "{:.1f}", "p95_meanwhile": "{:.1f}",
        "bytes_before": "{:,}", "bytes_after": "{:,}", "saved": "{:.1%}",
        "evidence_before": "{:.3f}", "evidence_after": "{:.3f}",
    }  # fmt: skip
    console.print(_table(condensed, kinds))
    if options.output:
        _write(options.output, rows)


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> Table:
    columns = {name: form for name, form in columns.items() if any(name in row for row in rows)}
    table = Table(*(name.replace("_", " ") for name in columns))
    for row in rows:
        table.add_row(*(f.format(row[n]) if n in row else "" for n, f in columns.items()))
    return table


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(row["what"] for row in rows))
    series = [
        (name, [(row["memories"], row["p95_ms"]) for row in rows if row["what"] == name])
        for name in names
    ]
    chart = lines(series, "memories", "p95, ms")
    cells = [
        [f"{row['memories']:,}", row["what"], f"{row['p50_ms']:.2f}", f"{row['p95_ms']:.2f}"]
        for row in rows
    ]
    sections = [
        ("p95 of one search", [chart]),
        ("Numbers", [html_table(["memories", "what", "p50 ms", "p95 ms"], cells)]),
    ]
    with atomic_path(path) as temporary:
        temporary.write_text(page("Memory search", hardware(), sections), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
