"""Measure contenders side by side: one process each, rounds in turn, ratios from paired rounds.

These machines are noisy, so nothing here is judged by one absolute time: every round runs each
contender once, in alternating order, and a ratio is the median over rounds of the pair's quotient.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from memopt.benchmark.peers import Contender
from memopt.bundle import stamp
from memopt.errors import InputError, MemoptError
from memopt.files import atomic_path
from memopt.jsontext import parse_json
from memopt.quantization.extremes import expected_minimum
from memopt.runtimes.cpu import cpu_model, usable_cpus
from memopt.runtimes.limits import process_vram_mb

WORKER = Path(__file__).with_name("worker.py")
# What decides speed; each contender tells the versions of its own environment.
PACKAGES = (
    "memopt",
    "onnxruntime",
    "openvino",
    "torch",
    "transformers",
    "sentence-transformers",
    "fastembed",
    "optimum",
    "numpy",
)
BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkMetrics:
    """What one contender did in one run. Times in seconds unless the name says ms."""

    label: str
    spec: Mapping[str, Any]
    python: str
    run_id: str
    items: int
    rounds_seconds: tuple[float, ...]  # per pass, one per round, paired by index within one run_id
    items_per_second: float  # items over the median round
    load_seconds: float
    first_vector_seconds: float
    latency_ms_p50: float
    latency_ms_p95: float
    latency_ms_p99: float
    rss_mb: float
    pss_mb: float
    rss_increase_mb: float  # over the worker before it opened the model
    cosine_min: float | None  # against the contender `reference`
    cosine_mean: float | None
    cosine_low: float | None = None  # what the minimum of as many other inputs stays above
    reference: str = ""
    inputs: str = ""  # the file they were read from; empty for seeded ones
    at: str = ""  # UTC
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)  # of the contender's own environment
    vram_mb: float | None = None

    def save(self, folder: Path) -> Path:
        """Write ``<folder>/<label>-<run_id>.json`` and return its path."""
        safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.label)
        target = folder / f"{safe}-{self.run_id}.json"
        with atomic_path(target) as path:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: Path) -> BenchmarkMetrics:
        """Read a file that :meth:`save` wrote.

        Raises:
            InputError: the file is missing or is not such a record.
        """
        try:
            raw = parse_json(path.read_bytes(), str(path))
            return cls(**{**raw, "rounds_seconds": tuple(raw["rounds_seconds"])})
        except (OSError, InputError, TypeError, KeyError) as error:
            raise InputError(
                f"{path} is not a benchmark record ({type(error).__name__}: {error})",
                fix="make one: memopt bench BUNDLE",
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Speed of one contender over another: above 1 is faster. 95 % bootstrap interval."""

    median: float
    low: float
    high: float
    rounds: int


class _Worker:
    """A contender in a process of its own, and what was measured of it."""

    def __init__(self, contender: Contender, environment: Mapping[str, str]) -> None:
        self.contender = contender
        self.opened: dict[str, Any] = {}
        self.embedding: np.ndarray[Any, Any] = np.empty((0, 0), np.float32)
        self.seconds: list[float] = []
        self.latencies: list[float] = []
        self.memory: dict[str, float] = {}
        self.vram_mb: float | None = None
        # The worker needs only its own folder off the path: a file there must not shadow a package.
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self.process = subprocess.Popen(
            [contender.python, "-P", str(WORKER), json.dumps(contender.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise MemoptError(f"{self.contender.label}: the benchmark process {self._end()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MemoptError(f"{self.contender.label}: {answer['error']}")
        return answer

    def _end(self) -> str:
        """Say how the process ended, with the last line it wrote."""
        code = self.process.wait()
        self.log.seek(0)
        tail = self.log.read().decode(errors="replace").strip().splitlines()[-1:]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"{how}: {tail[0]}" if tail else how

    def leave(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the process: after its last answer, or at once when something went wrong."""
        if kind is not None:
            self.process.kill()
        try:
            if self.process.stdin is not None:
                self.process.stdin.close()
        except BrokenPipeError:
            self.process.kill()  # it died with a command unread
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()


def run(
    contenders: Sequence[Contender],
    inputs: Sequence[Any],
    *,
    rounds: int = 5,
    singles: int = 200,
    round_seconds: float = 0.0,
    on_step: Callable[[str], None] | None = None,
    vectors: dict[str, np.ndarray[Any, Any]] | None = None,
    reference: Contender | None = None,
    failures: dict[str, str] | None = None,
    deadline: float | None = None,
    origin: str = "",
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

    Returns:
        One record per contender, in order, sharing a ``run_id``.

    Raises:
        MemoptError: a contender failed; the message names it and why.
    """
    if not inputs:
        raise InputError("nothing to measure: the input list is empty")
    say = on_step or (lambda line: None)
    threads = {"OMP_NUM_THREADS": str(usable_cpus()), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        file = _write_inputs(inputs, folder)
        workers: list[_Worker] = []

        def step(what: str, contender: Contender, work: Callable[[], None]) -> None:
            say(f"{what} {contender.label}")
            try:
                work()
            except MemoptError as error:
                if failures is None or contender in (contenders[0], reference):
                    raise
                failures[contender.label] = str(error).removeprefix(f"{contender.label}: ")
                workers[:] = [w for w in workers if w.contender is not contender]

        def start(contender: Contender) -> None:
            worker = _Worker(contender, threads)
            stack.push(worker.leave)
            worker.opened = worker.ask(do="open", inputs=str(file), packages=PACKAGES)
            workers.append(worker)

        right = None
        if reference is not None:
            step("open", reference, lambda: start(reference))
            worker = workers.pop()
            step("reference", reference, lambda: _encode(worker, folder))
            right = worker.embedding
            worker.leave(None)
        for contender in contenders:
            step("open", contender, partial(start, contender))
        for worker in list(workers):
            step("warm up", worker.contender, partial(_encode, worker, folder))
        for worker in list(workers):
            step("warm up singly", worker.contender, partial(_warm_singles, worker, singles))
        repeats = _repeats(workers[0], round_seconds)
        turns = _turns(min(singles, len(inputs)), rounds)
        took = 0.0
        for number in range(rounds):
            begin = time.monotonic()
            if number and deadline is not None and begin + took > deadline:
                break
            what, way = f"round {number + 1} of {rounds}:", (-1) ** number
            # Copies: a step takes a contender that failed off the list.
            for worker in workers[::way]:
                step(what, worker.contender, partial(_time_round, worker, repeats))
            for worker in workers[::way]:
                single = partial(_time_singles, worker, turns[number])
                step(f"{what} single inputs,", worker.contender, single)
            took = time.monotonic() - begin
        for worker in list(workers):
            step("memory of", worker.contender, partial(_weigh, worker))
    if vectors is not None:
        vectors.update({worker.contender.label: worker.embedding for worker in workers})
    common = {
        "run_id": uuid.uuid4().hex[:12],
        "items": len(inputs),
        "inputs": origin,
        "at": stamp({})["at"],
        "reference": (reference or contenders[0]).label,
        "hardware": hardware(),
    }
    against = workers[0].embedding if right is None else right
    return [_record(worker, against, common) for worker in workers]


def _encode(worker: _Worker, folder: Path) -> None:
    out = folder / "vectors.npy"
    worker.ask(do="encode", repeats=1, out=str(out))
    worker.embedding = np.load(out)


def _time_round(worker: _Worker, repeats: int) -> None:
    worker.seconds.append(worker.ask(do="encode", repeats=repeats)["seconds"])


def _repeats(first: _Worker, round_seconds: float) -> int:
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


def _warm_singles(worker: _Worker, count: int) -> None:
    worker.ask(do="adapt", count=count)


def _time_singles(worker: _Worker, part: range) -> None:
    worker.latencies += worker.ask(do="single", start=part.start, stop=part.stop)["times"]


def _weigh(worker: _Worker) -> None:
    worker.memory = worker.ask(do="memory")
    worker.vram_mb = process_vram_mb(worker.process.pid)


def _record(
    worker: _Worker, against: np.ndarray[Any, Any], common: Mapping[str, Any]
) -> BenchmarkMetrics:
    cosines = _cosines(against, worker.embedding)
    p50, p95, p99 = (float(v) * 1e3 for v in np.percentile(worker.latencies, (50, 95, 99)))
    return BenchmarkMetrics(
        label=worker.contender.label,
        spec=worker.contender.spec,
        python=worker.contender.python,
        rounds_seconds=tuple(worker.seconds),
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
        versions=worker.opened["versions"],
        **common,
    )


def ratio(a: BenchmarkMetrics, b: BenchmarkMetrics) -> Ratio:
    """Return how much faster ``a`` is than ``b``, from the paired rounds of one run.

    The interval is a percentile bootstrap of the median (Efron and Tibshirani 1993), seeded.

    Raises:
        InputError: the two records are of different runs, so their rounds are not pairs.

    >>> from types import SimpleNamespace as N
    >>> ratio(N(run_id="r", rounds_seconds=(1.0, 1.0)), N(run_id="r", rounds_seconds=(2.0, 2.0)))
    Ratio(median=2.0, low=2.0, high=2.0, rounds=2)
    """
    if a.run_id != b.run_id:
        raise InputError(f"runs {a.run_id} and {b.run_id} are not paired", fix="measure both anew")
    quotients = np.asarray(b.rounds_seconds) / np.asarray(a.rounds_seconds)
    generator = np.random.default_rng(0)
    samples = generator.choice(quotients, (BOOTSTRAP_SAMPLES, len(quotients)))
    low, high = np.percentile(np.median(samples, axis=1), (2.5, 97.5))
    return Ratio(
        median=float(np.median(quotients)), low=float(low), high=float(high), rounds=len(quotients)
    )


def hardware() -> dict[str, Any]:
    """Return processor, cores in use and memory of this machine."""
    import psutil

    return {
        "processor": cpu_model(),
        "cores": usable_cpus(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Return the installed versions that decide speed, and Python's."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _write_inputs(inputs: Sequence[Any], folder: Path) -> Path:
    if isinstance(inputs[0], str | Path):
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
