"""The bundle's own files in onnxruntime-genai and openvino-genai: the same greedy text as here?

    python benchmarks/interop_language.py BUNDLE [--new 32] [--json]

Each variant of a language model's bundle writes behind four prompts in memopt and, unchanged, in
the library whose format it is (its own environment, see generate.py). Exit code 1 where a float
graph's text differs. One that rounds its inputs may part where two tokens are as likely: how many
are equal is told.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from command_line import positive_int, run_main
from generate import Contender, Worker, language_model, peer_python, peers_of, prefix
from rich.console import Console
from rich.table import Table

from memopt.bundle import Bundle
from memopt.runtimes.generate.words import end_tokens

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
)


def written(contender: Contender, new: int, ends: frozenset[int]) -> list[list[int]]:
    """Return what a library writes behind each prompt, but the token that ends a text."""
    worker = Worker(contender)
    try:
        texts = [worker.ask({"prompt": prompt, "new": new})["tokens"] for prompt in PROMPTS]
    finally:
        worker.process.kill()
    return [text[:-1] if text and text[-1] in ends else text for text in texts]


def compare(bundle: Bundle, new: int) -> list[dict[str, Any]]:
    """Return a row for each variant and library."""
    rows: list[dict[str, Any]] = []
    ends = end_tokens(bundle.path)
    for label, spec in peers_of(bundle, 1):
        library, _, name = label.partition(", our ")
        if not name:
            continue
        device = "openvino" if library.startswith("openvino") else "cpu"
        own = {"kind": "memopt", "path": str(bundle.path.absolute()), "device": device}
        ours = written(Contender(name, {**own, "variant": name, "threads": 1}), new, ends)
        theirs = written(Contender(label, spec, peer_python()), new, ends)
        equal = [prefix(a, b) for a, b in zip(ours, theirs, strict=True)]
        whole = all(n == max(len(a), len(b)) for n, a, b in zip(equal, ours, theirs, strict=True))
        rows.append({"library": library, "variant": name, "equal_tokens": equal, "same": whole})
    return rows


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--new", type=positive_int, default=32)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = compare(language_model(given.bundle), given.new)
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        table = Table("library", "variant", f"equal tokens of {given.new}, by prompt", "same text")
        for row in rows:
            counts = ", ".join(map(str, row["equal_tokens"]))
            table.add_row(row["library"], row["variant"], counts, "yes" if row["same"] else "no")
        Console(width=110).print(table)
    exact = [row["same"] for row in rows if "fp32" in row["variant"]]
    sys.exit(0 if exact and all(exact) else 1)


if __name__ == "__main__":
    run_main(main)
