"""Measure contenders side by side: one process each, rounds in turn, ratios from paired rounds.

These machines are noisy, so nothing here is judged by one absolute time: every round runs each
contender once, in alternating order, and a ratio is the median over rounds of the pair's quotient.
"""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from memopt.benchmark.peers import Contender
from memopt.benchmark.race import Race, Worker
from memopt.benchmark.record import BenchmarkMetrics, hardware
from memopt.bundle import stamp
from memopt.errors import InputError, MemoptError
from memopt.progress import Step, silent
from memopt.quantization.accuracy.extremes import expected_minimum
from memopt.runtimes.limits import process_vram_mb
from memopt.tasks.quality import About, quality_of
from memopt.tasks.rows import load_rows
from memopt.tasks.table import task_of


def run(
    contenders: Sequence[Contender],
    inputs: Sequence[Any],
    *,
    rounds: int = 5,
    singles: int = 200,
    round_seconds: float = 0.0,
    on_step: Step = silent,
    vectors: dict[str, np.ndarray[Any, Any]] | None = None,
    reference: Contender | None = None,
    failures: dict[str, str] | None = None,
    deadline: float | None = None,
    origin: str = "",
    task: str = "embedding",
    config: Mapping[str, Any] | None = None,
) -> list[BenchmarkMetrics]:
    """Measure every contender on the same inputs in one run.

    Args:
        contenders: what is measured; ratios are against the first one.
        inputs: texts, paths of images or sounds, or arrays of one shape (images, waveforms).
        rounds: timed passes over all inputs per contender, after one that warms up.
        singles: how many inputs are also encoded one at a time, for the latency percentiles; after
            some untimed ones, a part of them in each round.
        round_seconds: a round goes over all inputs again until the first contender needs about so
            long; its time is told per pass. Of a few batches the last ones count too much.
        on_step: called with a line before each step, for a progress display.
        vectors: filled with each contender's embeddings (n, dim) float32, by label, when given.
        reference: gives the vectors that cosines are against, and is not timed; None takes the
            first contender.
        failures: filled with the reason, by label, of each contender but the first that fails and
            is left out; None raises at the first failure.
        deadline: in terms of ``time.monotonic``; no round that would pass it begins, except the
            first.
        origin: the file the inputs are of, recorded so that they can be found again.
        task: whose measures compare the answers.
        config: of the model, for measures that need the names of labels.

    Returns:
        One record per contender, in order, sharing a ``run_id``.

    Raises:
        MemoptError: a contender failed; the message names it and why.
    """
    if not inputs:
        raise InputError("nothing to measure: the input list is empty")
    must = (contenders[0],) if reference is None else (contenders[0], reference)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        race = Race(_write_inputs(inputs, folder), stack, on_step, must, failures)
        right = None
        if reference is not None:
            race.start(reference)
            race.each("reference", lambda worker: _encode(worker, folder))
            right = race.leave()
        for contender in contenders:
            race.start(contender)
        race.each("warm up", lambda worker: _encode(worker, folder))
        race.each("warm up singly", lambda worker: worker.ask(do="adapt", count=singles))
        repeats = _repeats(race.workers[0], round_seconds)
        took = 0.0
        for number, part in enumerate(_turns(min(singles, len(inputs)), rounds)):
            begin = time.monotonic()
            if number and deadline is not None and begin + took > deadline:
                break
            what, way = f"round {number + 1} of {rounds}:", (-1) ** number
            race.each(what, partial(_time_round, repeats=repeats), way)
            race.each(f"{what} single inputs,", partial(_time_singles, part=part), way)
            took = time.monotonic() - begin
        race.each("memory of", _weigh)
        race.each("kernels of", _profile)
    workers = race.workers
    if vectors is not None:
        vectors.update({worker.contender.label: worker.answers for worker in workers})
    common = {
        "run_id": uuid.uuid4().hex[:12],
        "items": len(inputs),
        "inputs": origin,
        "at": stamp({})["at"],
        "reference": (reference or contenders[0]).label,
        "hardware": hardware(),
    }
    against = workers[0].answers if right is None else right
    about = None if task_of(task).embeds else About(config or {}, inputs)
    return [_record(worker, against, common, task, about) for worker in workers]


def _encode(worker: Worker, folder: Path) -> None:
    out = folder / "vectors.npy"
    worker.ask(do="encode", repeats=1, out=str(out))
    worker.answers = load_rows(out)


def _time_round(worker: Worker, repeats: int) -> None:
    worker.seconds.append(worker.ask(do="encode", repeats=repeats)["seconds"])


def _repeats(first: Worker, round_seconds: float) -> int:
    once = first.ask(do="encode", repeats=1)["seconds"] if round_seconds else 0.0
    return max(1, round(round_seconds / once)) if once else 1


def _turns(count: int, rounds: int) -> list[range]:
    """Return which single inputs are timed in each round: parts of them, at least one each.

    A shared machine runs for seconds at a time at half its speed (both of its cores on one of the
    host's): whoever were timed in one go then would be the only one to look slow.

    >>> _turns(200, 2), _turns(1, 2)
    ([range(0, 100), range(100, 200)], [range(0, 1), range(0, 1)])
    """
    starts = [min(count * part // rounds, count - 1) for part in range(rounds)]
    return [range(a, max(a + 1, count * (i + 1) // rounds)) for i, a in enumerate(starts)]


def _time_singles(worker: Worker, part: range) -> None:
    times = worker.ask(do="single", start=part.start, stop=part.stop)["times"]
    worker.latencies += times
    worker.round_latencies.append(float(np.median(times)) * 1e3)


def _weigh(worker: Worker) -> None:
    worker.memory = worker.ask(do="memory")
    worker.variants = worker.ask(do="variants")
    worker.vram_mb = process_vram_mb(worker.process.pid)


def _profile(worker: Worker) -> None:
    if worker.contender.spec.get("kind") != "memopt":
        return
    try:
        worker.kernels = worker.ask(do="kernels")
    except MemoptError as error:
        # What was measured already stands; the record says why this is missing.
        worker.kernels = {"error": str(error)}


def _record(
    worker: Worker, against: Any, common: Mapping[str, Any], task: str, about: About | None
) -> BenchmarkMetrics:
    cosines = _cosines(against, worker.answers) if about is None else None
    measures = quality_of(task).compare(worker.answers, against, about) if about else {}
    p50, p95, p99 = (float(v) * 1e3 for v in np.percentile(worker.latencies, (50, 95, 99)))
    return BenchmarkMetrics(
        label=worker.contender.label,
        spec=worker.contender.spec,
        python=worker.contender.python,
        rounds_seconds=tuple(worker.seconds),
        rounds_latency_ms=tuple(worker.round_latencies),
        items_per_second=common["items"] / float(np.median(worker.seconds)),
        load_seconds=worker.opened["load_seconds"],
        first_vector_seconds=worker.opened["first_vector_seconds"],
        latency_ms_p50=p50,
        latency_ms_p95=p95,
        latency_ms_p99=p99,
        rss_mb=worker.memory["rss_mb"],
        pss_mb=worker.memory["pss_mb"],
        rss_increase_mb=worker.memory["rss_mb"] - worker.opened["base"]["rss_mb"],
        cosine_min=None if cosines is None else float(cosines.min()),
        cosine_mean=None if cosines is None else float(cosines.mean()),
        cosine_low=None if cosines is None else expected_minimum(cosines),
        vram_mb=worker.vram_mb,
        kernels=worker.kernels,
        variants=worker.variants,
        measures=measures,
        versions=worker.opened["versions"],
        **common,
    )


def _write_inputs(inputs: Sequence[Any], folder: Path) -> Path:
    if isinstance(inputs[0], str | Path | tuple | list):
        path = folder / "inputs.json"
        named = [str(item.absolute()) if isinstance(item, Path) else item for item in inputs]
        path.write_text(json.dumps(named), encoding="utf-8")
    else:
        path = folder / "inputs.npy"
        np.save(path, np.stack([np.asarray(item) for item in inputs]))
    return path


def _cosines(reference: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> Any:
    if reference.shape != other.shape:
        return None
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(other, axis=1)
    return (reference * other).sum(axis=1) / np.maximum(norms, 1e-12)
