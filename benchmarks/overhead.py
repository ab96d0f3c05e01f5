"""How much time encode() spends outside the session: batches and single sentences.

The pure session time is that of the same feeds, in the same order and on the same backend, run
again without tokenizing, sorting, scattering or recording. Rounds alternate.

    python benchmarks/overhead.py --bundle minilm
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from command_line import positive_int, run_main
from rich.console import Console
from rich.table import Table

from memopt import ArrowEngine, open_bundle
from memopt.benchmark.workload import default_inputs


def asked_of(engine: ArrowEngine, texts: list[str]) -> tuple[Any, list[tuple[str, Any]]]:
    """Return the backend that encode() asks for ``texts``, and each method and feed it asks with.

    They are noted on the way: which texts share a row, and who answers one alone, is the engine's.
    """
    single = engine._single.chain if engine._single and len(texts) == 1 else None
    backend: Any = (single or engine._chain).backend
    calls: list[tuple[str, Any]] = []

    def noted(method: str) -> Callable[[Any], Any]:
        ask = getattr(backend, method)

        def call(feed: Any) -> Any:
            calls.append((method, feed))
            return ask(feed)

        return call

    backend.run, backend.submit = noted("run"), noted("submit")
    try:
        engine.encode(texts)
    finally:
        del backend.run, backend.submit
    return backend, calls


def pure(engine: ArrowEngine, texts: list[str]) -> float:
    """Return the seconds the backend alone needs for the batches encode() makes of ``texts``."""
    backend, calls = asked_of(engine, texts)
    begin = time.perf_counter()
    answers = [getattr(backend, method)(feed) for method, feed in calls]
    for (method, _), answer in zip(calls, answers, strict=True):
        if method == "submit":
            answer.result()
    return time.perf_counter() - begin


def whole(engine: ArrowEngine, texts: list[str]) -> float:
    """Return the seconds of encode()."""
    begin = time.perf_counter()
    engine.encode(texts)
    return time.perf_counter() - begin


def ratio(engine: ArrowEngine, inputs: list[list[str]]) -> tuple[float, float, float]:
    """Return median seconds of encode() and of the sessions, and the median of their ratios."""
    pairs = []
    for number, texts in enumerate(inputs):
        if number % 2:
            pairs.append((whole(engine, texts), pure(engine, texts)))
        else:
            session = pure(engine, texts)
            pairs.append((whole(engine, texts), session))
    ours, session = (statistics.median(side) for side in zip(*pairs, strict=True))
    return ours, session, statistics.median(a / b for a, b in pairs)


def main() -> None:
    """Print one row per variant and kind of request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="minilm")
    parser.add_argument("--variants", default="onnx-fp32-fused,openvino-fp32")
    parser.add_argument("--count", type=positive_int, default=500)
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    texts = default_inputs(bundle.manifest, options.count)
    table = Table("variant", "request", "encode ms", "session ms", "ratio")
    results = []
    for name in options.variants.split(","):
        with ArrowEngine(bundle, variant=name) as engine:
            engine.encode(texts)
            engine.encode(texts[:1])
            kinds = {
                f"{options.count} at once": [texts] * options.rounds,
                "one sentence": [[text] for text in texts[:200]],
            }
            for kind, inputs in kinds.items():
                ours, session, share = ratio(engine, inputs)
                results.append({"variant": name, "request": kind, "ratio": share})
                row = (f"{ours * 1000:.2f}", f"{session * 1000:.2f}", f"{share:.3f}")
                table.add_row(name, kind, *row)
    if options.json:
        print(json.dumps(results, indent=1))
        return
    Console().print(table)


if __name__ == "__main__":
    run_main(main)
