"""How encode() scales with the number of inputs and with their length; writes docs/scaling.html.

    python benchmarks/scaling.py [--bundle models/minilm] [--largest 100000]

Inputs are seeded sentences. Memory is the peak resident size of the process after each size.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from memopt import ArrowEngine, open_bundle
from memopt.benchmark.runner import hardware
from memopt.benchmark.workload import default_inputs
from memopt.charts import lines, page
from memopt.charts import table as html_table
from memopt.files import atomic_path

LENGTHS = (8, 16, 32, 64, 128, 256, 512)
# Enough tokens per length that one pass is far above timer noise.
TOKENS_PER_LENGTH = 16_384


def timed(engine: ArrowEngine, texts: list[str], passes: int) -> float:
    """Return the median seconds of ``passes`` encodes."""
    seconds = []
    for _ in range(passes):
        begin = time.perf_counter()
        engine.encode(texts)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main() -> None:
    """Print both tables and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="minilm")
    parser.add_argument("--largest", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=Path("docs/scaling.html"))
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    sizes = [n for n in (1, 10, 100, 1_000, 10_000, 100_000) if n <= options.largest]
    texts = default_inputs(bundle.manifest, sizes[-1])
    console = Console(width=110)
    with ArrowEngine(bundle) as engine:
        engine.encode(texts[:200])
        by_size = []
        counts = Table("inputs", "seconds", "sentences/s", "peak RSS MB", "of it vectors")
        for size in sizes:
            seconds = timed(engine, texts[:size], 5 if size <= 1_000 else 1)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            by_size.append((size, seconds, size / seconds, peak))
            vectors = size * engine.dimension * 4 / 2**20
            counts.add_row(
                f"{size:,}",
                f"{seconds:.4f}",
                f"{size / seconds:,.0f}",
                f"{peak:.0f}",
                f"{vectors:.0f}",
            )
        console.print(counts)
        by_length = []
        lengths = Table("words", "sentences/s", "words/s")
        for length in LENGTHS:
            # One-syllable words of the vocabulary stay one token each or nearly so.
            batch = ["the " * (length - 2)] * max(8, TOKENS_PER_LENGTH // length)
            seconds = timed(engine, batch, 3)
            by_length.append((length, len(batch) / seconds))
            rate = len(batch) / seconds
            lengths.add_row(str(length), f"{rate:,.0f}", f"{rate * length:,.0f}")
        console.print(lengths)
        info = engine.device_info()
    html = page(
        "memopt: how encode() scales",
        [
            (
                "Time against number of inputs",
                lines([("seconds", [(n, s) for n, s, _, _ in by_size])], "inputs", "s", log=True),
            ),
            (
                "Peak memory against number of inputs",
                lines([("MB", [(n, p) for n, _, _, p in by_size])], "inputs", "MB", log=True),
            ),
            (
                "Throughput against length (tokens)",
                lines([("sentences/s", list(by_length))], "tokens", "sentences/s", log=True),
            ),
            ("Numbers", html_table(("inputs", "s", "sentences/s", "peak RSS MB"), by_size)),
        ],
        note=f"{info}; {hardware()}",
    )
    with atomic_path(options.output) as path:
        path.write_text(html, encoding="utf-8")
    console.print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
