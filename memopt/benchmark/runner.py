"""Measure contenders side by side: one process each, rounds in turn, ratios from paired rounds.

These machines are noisy, so nothing here is judged by one absolute time: every round runs each
contender once, in alternating order, and a ratio is the median over rounds of the pair's quotient.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from memopt.benchmark.peers import Contender
from memopt.errors import InputError, MemoptError
from memopt.files import atomic_path
from memopt.runtimes.limits import process_vram_mb

WORKER = Path(__file__).with_name("worker.py")
PACKAGES = ("memopt", "onnxruntime", "openvino", "torch", "sentence-transformers", "numpy")
BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkMetrics:
    """What one contender did in one run. Times in seconds unless the name says ms."""

    label: str
    spec: Mapping[str, Any]
    python: str
    run_id: str
    items: int
    rounds_seconds: tuple[float, ...]  # one per round, paired by index within one run_id
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
    reference: str = ""
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
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
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**raw, "rounds_seconds": tuple(raw["rounds_seconds"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
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
    def __init__(self, contender: Contender, environment: Mapping[str, str]) -> None:
        self.contender = contender
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
            self.log.seek(0)
            tail = self.log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise MemoptError(f"{self.contender.label}: the benchmark process died {tail}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MemoptError(f"{self.contender.label}: {answer['error']}")
        return answer

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()


def run(
    contenders: Sequence[Contender],
    inputs: Sequence[Any],
    *,
    rounds: int = 5,
    singles: int = 200,
    on_step: Callable[[str], None] | None = None,
    vectors: dict[str, np.ndarray[Any, Any]] | None = None,
    reference: Contender | None = None,
) -> list[BenchmarkMetrics]:
    """Measure every contender on the same inputs in one run.

    Args:
        contenders: what is measured; ratios are against the first one.
        inputs: texts, or arrays of one shape (images, waveforms).
        rounds: timed passes over all inputs per contender, after one that warms up.
        singles: how many inputs are also encoded one at a time, for the latency percentiles; after
            some untimed ones.
        on_step: called with a line before each step, for a progress display.
        vectors: filled with each contender's embeddings (n, dim) float32, by label, when given.
        reference: gives the vectors that cosines are against, and is not timed; None takes the
            first contender.

    Returns:
        One record per contender, in order, sharing a ``run_id``.

    Raises:
        MemoptError: a contender failed; the message names it and why.
    """
    if not inputs:
        raise InputError("nothing to measure: the input list is empty")
    say = on_step or (lambda line: None)
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        file = _write_inputs(inputs, Path(folder))
        right = None
        if reference is not None:
            say(f"reference {reference.label}")
            out = Path(folder) / "reference.npy"
            with closing(_Worker(reference, threads)) as worker:
                worker.ask(do="open", inputs=str(file))
                worker.ask(do="encode", out=str(out))
            right = np.load(out)
        workers = []
        opened = []
        for contender in contenders:
            say(f"open {contender.label}")
            worker = _Worker(contender, threads)
            stack.callback(worker.close)
            workers.append(worker)
            opened.append(worker.ask(do="open", inputs=str(file)))
        embeddings = []
        for index, worker in enumerate(workers):
            say(f"warm up {worker.contender.label}")
            out = Path(folder) / f"{index}.npy"
            worker.ask(do="encode", out=str(out))
            embeddings.append(np.load(out))
            if vectors is not None:
                vectors[worker.contender.label] = embeddings[-1]
        seconds: list[list[float]] = [[] for _ in workers]
        for number in range(rounds):
            order = range(len(workers)) if number % 2 == 0 else reversed(range(len(workers)))
            for index in order:
                say(f"round {number + 1} of {rounds}: {workers[index].contender.label}")
                seconds[index].append(workers[index].ask(do="encode")["seconds"])
        latencies = []
        for worker in workers:
            say(f"single inputs: {worker.contender.label}")
            latencies.append(worker.ask(do="single", count=singles)["times"])
        memory = [worker.ask(do="memory") for worker in workers]
        vram = [process_vram_mb(worker.process.pid) for worker in workers]
    run_id = uuid.uuid4().hex[:12]
    records = []
    for index, contender in enumerate(contenders):
        cosines = _cosines(embeddings[0] if right is None else right, embeddings[index])
        p50, p95, p99 = (float(v) for v in np.percentile(latencies[index], (50, 95, 99)))
        records.append(
            BenchmarkMetrics(
                label=contender.label,
                spec=contender.spec,
                python=contender.python,
                run_id=run_id,
                items=len(inputs),
                rounds_seconds=tuple(seconds[index]),
                items_per_second=len(inputs) / float(np.median(seconds[index])),
                load_seconds=opened[index]["load_seconds"],
                first_vector_seconds=opened[index]["first_vector_seconds"],
                latency_ms_p50=p50 * 1e3,
                latency_ms_p95=p95 * 1e3,
                latency_ms_p99=p99 * 1e3,
                rss_mb=memory[index]["rss_mb"],
                pss_mb=memory[index]["pss_mb"],
                rss_increase_mb=memory[index]["rss_mb"] - opened[index]["base"]["rss_mb"],
                cosine_min=None if cosines is None else float(cosines.min()),
                cosine_mean=None if cosines is None else float(cosines.mean()),
                reference=(reference or contenders[0]).label,
                vram_mb=vram[index],
                hardware=hardware(),
                versions=versions(),
            )
        )
    return records


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

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
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
    if isinstance(inputs[0], str):
        path = folder / "inputs.json"
        path.write_text(json.dumps(list(inputs)), encoding="utf-8")
    else:
        path = folder / "inputs.npy"
        np.save(path, np.stack([np.asarray(item) for item in inputs]))
    return path


def _cosines(reference: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> Any:
    if reference.shape != other.shape:
        return None
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(other, axis=1)
    return (reference * other).sum(axis=1) / np.maximum(norms, 1e-12)
