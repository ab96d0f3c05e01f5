"""Memory of 1 and 4 worker processes, each with an engine of its own on one bundle.

PSS counts a page shared by n processes as 1/n, so the sum is what the machine really spends. Run
with and without the graph cache: with it the weights are mapped, and shared.

    python benchmarks/rss.py --bundle minilm
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from memopt import open_bundle
from memopt.runtimes.graph_cache import SWITCH

WORKER = """
import sys
from memopt import ArrowEngine
engine = ArrowEngine({path!r}, device={device!r}, variant={variant!r})
engine.encode(["a cat", "a longer sentence about a dog"] * 64)
print("ready", flush=True)
sys.stdin.readline()
"""
FIELDS = {"Rss:": "rss_mb", "Pss:": "pss_mb", "Anonymous:": "anonymous_mb"}


def memory(pid: int) -> dict[str, float]:
    """Return what Linux says about a process's memory, in MB."""
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return {FIELDS[line[0]]: int(line[1]) / 1024 for line in lines if line[0] in FIELDS}


def measure(code: str, count: int, *, cache: bool) -> list[dict[str, float]]:
    """Return the memory of ``count`` workers while all of them are open."""
    environment = {**os.environ, SWITCH: "1" if cache else "0"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(count)
    ]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    found = [memory(worker.pid) for worker in workers]
    for worker in workers:
        worker.communicate("\n")
    return found


def main() -> None:
    """Print one row per number of workers, with and without the cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="minilm")
    parser.add_argument("--variant", default="onnx-fp32-fused")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    path = str(open_bundle(options.bundle).path.absolute())
    code = WORKER.format(path=path, device=options.device, variant=options.variant)
    measure(code, 1, cache=True)  # makes the cache
    names = ("graph cache", "workers", "RSS MB each", "anonymous MB each", "PSS MB together")
    table = Table(*names)
    for cache in (False, True):
        for count in (1, 4):
            found = measure(code, count, cache=cache)
            rss, anonymous = (
                sum(item[name] for item in found) / count for name in ("rss_mb", "anonymous_mb")
            )
            together = sum(item["pss_mb"] for item in found)
            row = (f"{rss:.0f}", f"{anonymous:.0f}", f"{together:.0f}")
            table.add_row("yes" if cache else "no", str(count), *row)
    Console().print(table)


if __name__ == "__main__":
    main()
