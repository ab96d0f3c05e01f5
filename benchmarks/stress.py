"""8 threads and 64 coroutines encode on one engine for a minute: right answers, flat memory.

    python benchmarks/stress.py [--bundle models/minilm] [--seconds 60] [--warm-up 60]

Exits 1 when an answer differs from the serial one by more than 1e-5, or when memory in use after
the last quarter is more than 2 % above the first quarter's. The same load runs for the warm-up
before: it takes that long until every stream and thread has met the largest shapes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import threading
import time

import numpy as np
import psutil
from command_line import nonnegative_float, positive_float, run_main

from memopt import ArrowEngine, open_bundle
from memopt.benchmark.workload import default_inputs

THREADS, COROUTINES = 8, 64
TOLERANCE, GROWTH = 1e-5, 1.02


def main() -> None:
    """Encode from everywhere at once and compare with serial answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bundle", default="minilm")
    parser.add_argument("--seconds", type=positive_float, default=60)
    parser.add_argument("--warm-up", type=nonnegative_float, default=60)
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    texts = default_inputs(bundle.manifest, 256)
    process = psutil.Process()
    lock = threading.Lock()
    worst, calls = 0.0, 0
    memory: list[int] = []
    with ArrowEngine(bundle) as engine:
        serial = np.concatenate([engine.encode([text]) for text in texts])
        begin = time.monotonic() + options.warm_up
        end = begin + options.seconds

        def compare(picked: np.ndarray, answer: np.ndarray) -> None:
            nonlocal worst, calls
            error = float(np.abs(answer - serial[picked]).max())
            with lock:
                worst, calls = max(worst, error), calls + 1

        def thread(seed: int) -> None:
            generator = np.random.default_rng(seed)
            while time.monotonic() < end:
                picked = generator.integers(0, len(texts), generator.integers(1, 40))
                compare(picked, engine.encode([texts[i] for i in picked]))

        async def coroutine(seed: int) -> None:
            generator = np.random.default_rng(1000 + seed)
            while time.monotonic() < end:
                picked = generator.integers(0, len(texts), 1)
                answer = await engine.aencode(texts[picked[0]])
                compare(picked, np.atleast_2d(answer))

        async def coroutines() -> None:
            await asyncio.gather(*(coroutine(number) for number in range(COROUTINES)))

        workers = [threading.Thread(target=thread, args=(n,)) for n in range(THREADS)]
        workers.append(threading.Thread(target=lambda: asyncio.run(coroutines())))
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            if time.monotonic() > begin:
                memory.append(process.memory_info().rss)
            time.sleep(options.seconds / 100)
        for worker in workers:
            worker.join()
    quarter = max(1, len(memory) // 4)
    first, last = (statistics.median(part) for part in (memory[:quarter], memory[-quarter:]))
    print(f"{calls:,} calls, largest difference from serial {worst:.1e}")
    print(f"memory in use {first / 1e6:.0f} MB in the first quarter, {last / 1e6:.0f} in the last")
    if worst > TOLERANCE:
        raise SystemExit(f"a difference of more than {TOLERANCE:.0e}")
    if last > GROWTH * first:
        raise SystemExit(f"memory grew by more than {GROWTH - 1:.0%}: leak or short --warm-up")


if __name__ == "__main__":
    run_main(main)
