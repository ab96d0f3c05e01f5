"""How encode() scales with the number of inputs and with their length.

    python benchmarks/scaling.py [--bundle models/minilm] [--largest 100000]

Prints two tables and writes docs/scaling.html and, as pictures, docs/scaling-inputs.svg and
docs/scaling-lengths.svg. Inputs are seeded sentences; those of a given length are made of words of
one token each, past the bundle's own limit too, up to what the model's positions allow. Memory is
the peak of the resident size, also without the vectors that are given back.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from command_line import positive_int, run_main
from line_chart import lines, picture
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from memopt import ArrowEngine, Bundle, open_bundle
from memopt.benchmark.record import hardware
from memopt.benchmark.workload import default_inputs
from memopt.files import atomic_path
from memopt.pages import page
from memopt.pages import table as html_table

SIZES = (1, 10, 100, 1_000, 10_000, 100_000)
LENGTHS = (8, 16, 32, 64, 128, 256, 512)
# Enough tokens per length that one pass is far above timer noise.
TOKENS_PER_LENGTH = 16_384
SIZE_HEADER = ("inputs", "seconds", "sentences/s", "peak RSS MB", "without vectors MB")
LENGTH_HEADER = ("tokens", "sentences/s", "tokens/s")


def timed(engine: ArrowEngine, texts: list[str], passes: int) -> float:
    """Return the median seconds of ``passes`` encodes."""
    seconds = []
    for _ in range(passes):
        begin = time.perf_counter()
        engine.encode(texts)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def by_size(bundle: Bundle, largest: int) -> list[tuple[int, float, float, float, float]]:
    """Return a row of SIZE_HEADER per number of inputs."""
    sizes = [size for size in SIZES if size <= largest]
    texts = default_inputs(bundle.manifest, sizes[-1])
    rows = []
    with ArrowEngine(bundle) as engine:
        engine.encode(texts[:200])
        for size in sizes:
            seconds = timed(engine, texts[:size], 5 if size <= 1_000 else 1)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            vectors = size * engine.dimension * 4 / 2**20
            rows.append((size, seconds, size / seconds, peak, peak - vectors))
    return rows


def by_length(bundle: Bundle) -> list[tuple[int, float, float]]:
    """Return a row of LENGTH_HEADER per number of tokens."""
    most = bundle.config().get("max_position_embeddings", LENGTHS[-1])
    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    spoken = sorted(
        {word for text in default_inputs(bundle.manifest, 500) for word in text.split()}
    )
    extra = len(tokenizer.encode("").ids)
    words = np.array([word for word in spoken if len(tokenizer.encode(word).ids) == extra + 1])
    generator = np.random.default_rng(0)
    # The bundle cuts where its sentence-transformers settings do; the graph goes further.
    longer = Bundle(bundle.path, replace(bundle.manifest, max_length=most))
    rows = []
    with ArrowEngine(longer) as engine:
        for length in (length for length in LENGTHS if length <= most):
            count = max(8, TOKENS_PER_LENGTH // length)
            texts = [" ".join(generator.choice(words, length - extra)) for _ in range(count)]
            engine.encode(texts)
            rate = count / timed(engine, texts, 3)
            rows.append((length, rate, rate * length))
    return rows


def show(console: Console, header: tuple[str, ...], rows: list[tuple[float, ...]]) -> None:
    """Print rows of numbers."""
    table = Table(*header)
    for row in rows:
        table.add_row(*(f"{value:,.4f}" if value < 1 else f"{value:,.0f}" for value in row))
    console.print(table)


def main() -> None:
    """Print both tables and write the page and the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bundle", default="minilm")
    parser.add_argument("--largest", type=positive_int, default=SIZES[-1])
    parser.add_argument("--output", type=Path, default=Path("docs"))
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    console = Console(width=110)
    sizes = by_size(bundle, options.largest)
    show(console, SIZE_HEADER, [tuple(row) for row in sizes])
    lengths = by_length(bundle)
    show(console, LENGTH_HEADER, [tuple(row) for row in lengths])
    with ArrowEngine(bundle) as engine:
        info = engine.device_info()
    machine = hardware()
    time_chart = lines([("s", [(n, s) for n, s, *_ in sizes])], "inputs", "seconds")
    memory_chart = lines(
        [
            ("peak", [(row[0], row[3]) for row in sizes]),
            ("without the vectors", [(row[0], row[4]) for row in sizes]),
        ],
        "inputs",
        "MB",
        from_zero=True,
    )
    length_chart = lines(
        [("sentences/s", [(n, rate) for n, rate, _ in lengths])],
        "tokens per sentence",
        "sentences/s",
        x_marks=[n for n, *_ in lengths],
    )
    html = page(
        "memopt: how encode() scales",
        {
            "model": bundle.manifest.name,
            "run as": f"{info['variant']} with {info['runtime']}, {info['threads']} threads",
            "machine": f"{machine['processor']}, {machine['cores']} cores, "
            f"{machine['memory_gb']} GB",
        },
        [
            ("Time against number of inputs", [time_chart]),
            ("Peak memory against number of inputs", [memory_chart]),
            ("Throughput against length", [length_chart]),
            ("By number of inputs", [html_table(SIZE_HEADER, sizes)]),
            ("By length", [html_table(LENGTH_HEADER, lengths)]),
        ],
    )
    files = {
        "scaling.html": html,
        "scaling-inputs.svg": picture(time_chart, "Seconds against number of inputs"),
        "scaling-lengths.svg": picture(length_chart, "Sentences per second against tokens"),
    }
    for name, text in files.items():
        with atomic_path(options.output / name) as path:
            path.write_text(text, encoding="utf-8")
        console.print(f"wrote {options.output / name}")


if __name__ == "__main__":
    run_main(main)
