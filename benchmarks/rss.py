"""Memory of 1 and 4 worker processes, and of 1 and 4 engines in one process, on one bundle.

PSS counts a page shared by n processes as 1/n, so the sum is what the machine really spends. ONNX
variants run with and without the graph cache: with it the weights are mapped, and shared by all.

    python benchmarks/rss.py --bundle minilm [--variants onnx-fp32-fused,openvino-int8-static]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from command_line import run_main
from rich.console import Console
from rich.table import Table

from memopt import open_bundle
from memopt.runtimes.graph_cache import SWITCH

WORKER = """
import sys
from memopt import ArrowEngine
engines = [ArrowEngine({path!r}, device={device!r}, variant={variant!r}) for _ in range({count})]
for engine in engines:
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
    """Print one row per variant, number of processes and number of engines in each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bundle", default="minilm")
    parser.add_argument("--variants", default="onnx-fp32-fused,openvino-fp32")
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    names = ("variant", "graph cache", "processes", "engines each", "RSS MB each")
    table = Table(*names, "anonymous MB each", "PSS MB together")
    for variant in options.variants.split(","):
        device = "openvino" if bundle.variant(variant).format == "openvino" else "cpu"
        values = {"path": str(bundle.path.absolute()), "device": device, "variant": variant}
        if device == "cpu":
            measure(WORKER.format(**values, count=1), 1, cache=True)  # makes the cache
        for cache in (False, True) if device == "cpu" else (True,):
            for processes, engines in ((1, 1), (4, 1), (1, 4)):
                code = WORKER.format(**values, count=engines)
                found = measure(code, processes, cache=cache)
                rss, anonymous = (
                    sum(item[name] for item in found) / processes
                    for name in ("rss_mb", "anonymous_mb")
                )
                together = sum(item["pss_mb"] for item in found)
                cached = "-" if device != "cpu" else "yes" if cache else "no"
                numbers = (f"{rss:.0f}", f"{anonymous:.0f}", f"{together:.0f}")
                table.add_row(variant, cached, str(processes), str(engines), *numbers)
    Console(width=130).print(table)


if __name__ == "__main__":
    run_main(main)
