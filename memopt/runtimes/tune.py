"""Measure how many streams suit a variant on this machine, and remember it in the manifest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from memopt.bundle import Bundle, Manifest
from memopt.errors import InputError
from memopt.runtimes.cpu import machine_key, usable_cpus
from memopt.runtimes.task_engine import Engine, open_task

ROUNDS = 5
# One pass over few inputs is a dozen batches: over two streams their last ones run alone, which a
# long job does not feel. A round repeats the inputs for so long, at most so often.
_ROUND_SECONDS, _MOST_REPEATS = 0.8, 32
# More streams must win by this much: within it the noise of a shared machine decides, and one
# stream needs the least memory.
_MARGIN = 1.03


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTuning:
    """What was measured: inputs per second by number of streams, and the number chosen."""

    device: str
    variant: str
    streams: int
    items_per_second: dict[int, float]


def tune_streams(
    bundle: Bundle,
    inputs: Sequence[Any],
    *,
    device: str = "auto",
    variant: str = "auto",
    threads: int | None = None,
    remember: bool = True,
) -> StreamTuning:
    """Try 1, 2, 4 ... streams sharing the cores, in alternating rounds, and keep the fastest.

    Args:
        inputs: what to encode in each round; a few hundred of realistic length.
        remember: record the number for this machine in ``manifest.chosen``, where every engine
            finds it.

    Raises:
        InputError: no inputs.
        DeviceError, BundleError: as for ArrowEngine.
    """
    if not inputs:
        raise InputError("no inputs to measure with", fix="give a few hundred realistic ones")
    cores = threads or usable_cpus()
    counts = [1 << power for power in range(cores.bit_length()) if 1 << power <= cores]
    engines = {
        count: open_task(bundle, device=device, variant=variant, threads=threads, streams=count)
        for count in counts
    }
    try:
        work = _enough(engines[1], inputs)
        for engine in engines.values():
            engine.comparable(work)  # compiles, fills caches
        rates: dict[int, list[float]] = {count: [] for count in counts}
        for turn in range(ROUNDS):
            for count in counts if turn % 2 == 0 else reversed(counts):
                begin = time.perf_counter()
                engines[count].comparable(work)
                rates[count].append(len(work) / (time.perf_counter() - begin))
        info = engines[1].device_info()
    finally:
        for engine in engines.values():
            engine.close()
    median = {count: statistics.median(values) for count, values in rates.items()}
    best = _best(rates)
    tuning = StreamTuning(
        device=info["device"], variant=info["variant"], streams=best, items_per_second=median
    )
    if remember:
        bundle.update(lambda manifest: _remembered(manifest, tuning))
    return tuning


def _enough(engine: Engine, inputs: Sequence[Any]) -> list[Any]:
    """Return the inputs as often as one stream needs a round's time for."""
    engine.comparable(inputs)
    begin = time.perf_counter()
    engine.comparable(inputs)
    once = max(time.perf_counter() - begin, 1e-6)
    return [*inputs] * max(1, min(_MOST_REPEATS, round(_ROUND_SECONDS / once)))


def _best(rates: dict[int, list[float]]) -> int:
    """Return the number of streams that wins by the median of paired rounds.

    >>> _best({1: [100.0, 50.0, 100.0], 2: [110.0, 55.0, 90.0]})
    2
    >>> _best({1: [100.0, 100.0], 2: [102.0, 102.0]})
    1
    """
    best = 1
    for count in list(rates)[1:]:
        pairs = zip(rates[count], rates[best], strict=True)
        if statistics.median(a / b for a, b in pairs) > (_MARGIN if best == 1 else 1.0):
            best = count
    return best


def _remembered(manifest: Manifest, tuning: StreamTuning) -> Manifest:
    record = dict(manifest.chosen.get(machine_key()) or {})
    streams = {**record.get("streams", {}), f"{tuning.device}:{tuning.variant}": tuning.streams}
    record["streams"] = streams
    return replace(manifest, chosen={**manifest.chosen, machine_key(): record})
