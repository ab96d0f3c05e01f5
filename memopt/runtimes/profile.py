"""Where the time of one input goes: tokenizing, Python around, copies, the session, its kernels."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from memopt.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    from memopt.runtimes.base import Feed
    from memopt.runtimes.task_engine import Engine

# Runs that are timed, and those before: a shape that comes often gets a graph of its own first.
RUNS, WARM = 200, 100
# Runs with the runtime's own profiler on, which slows them: their shares count, not their sum.
PROFILED = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """All nodes of one type that one implementation computes; ``ms`` of one run together."""

    kind: str
    implementation: str
    count: int
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The milliseconds of one input, medians over ``runs``, all parts timed in the same requests.

    But for the session alone, which is timed in turn with them.

    Attributes:
        input: the input, or what it is.
        total_ms: of the whole request.
        stages: ``tokenize`` (or ``prepare``), ``python``, ``bind and copy``, ``session``; together
            the whole.
        kernels: inside the session, most time first, as the runtime's profiler tells them.
    """

    variant: str
    device: str
    input: str
    runs: int
    total_ms: float
    stages: dict[str, float]
    kernels: tuple[Kernel, ...]

    def shares(self) -> list[tuple[Kernel, float]]:
        """Return each kernel with the milliseconds of the session that are its share."""
        whole = sum(kernel.ms for kernel in self.kernels) or 1.0
        return [(k, k.ms / whole * self.stages["session"]) for k in self.kernels]


class Profiled(Protocol):
    """A backend that can tell: of OpenVINO and of ONNX Runtime."""

    def bound(self, feed: Feed) -> Callable[[], object]:
        """Return a run of the session alone, its inputs bound."""

    def kernels(self, feed: Feed, runs: int) -> list[Kernel]:
        """Return the kernels of one run."""


def profile_one(engine: Engine, item: Any) -> Profile:
    """Measure where the time of one input goes, on whatever answers single inputs.

    Raises:
        ConfigurationError: its runtime has no profiler here.
        InputError: the input cannot be used, or is more than one run of the graph.
    """
    whole = [item]
    for _ in range(WARM):
        engine.comparable(whole)
    path = engine._single
    chain = (path.chain if path else None) or engine._chain
    backend: Any = chain.backend
    if not hasattr(backend, "kernels"):
        raise ConfigurationError(
            f"{chain.candidate} cannot be profiled",
            fix="take an OpenVINO variant, or an ONNX one on ONNX Runtime",
        )
    front: Any = engine._front_end()
    feed = _feed_of(backend, lambda: engine.comparable(whole))
    first = "tokenize" if hasattr(front, "tokenize") else "prepare"
    bare = backend.bound(feed)
    spent: dict[str, list[float]] = {"total": [], "run": [], first: [], "session": []}
    with _timed(backend, "run", spent["run"]), _timed(front, first, spent[first]):
        for _ in range(RUNS):
            _time(spent["total"], engine.comparable, whole)
            _time(spent["session"], bare)
    times = {name: median(values) * 1e3 for name, values in spent.items()}
    around = [
        total - run - prepared
        for total, run, prepared in zip(spent["total"], spent["run"], spent[first], strict=True)
    ]
    stages = {
        first: times[first],
        "python": median(around) * 1e3,
        "bind and copy": max(0.0, times["run"] - times["session"]),
        "session": min(times["session"], times["run"]),
    }
    return Profile(
        variant=chain.candidate.variant.name,
        device=chain.candidate.provider,
        input=item if isinstance(item, str) else type(item).__name__,
        runs=RUNS,
        total_ms=times["total"],
        stages=stages,
        kernels=tuple(backend.kernels(feed, PROFILED)),
    )


def _feed_of(backend: Any, request: Callable[[], object]) -> Feed:
    """Return what one request hands to the session."""
    feeds: list[Feed] = []
    run = backend.run

    def noted(feed: Feed) -> Any:
        feeds.append(feed)
        return run(feed)

    backend.run = noted
    try:
        request()
    finally:
        del backend.run
    if len(feeds) != 1:
        raise InputError(
            f"the input is {len(feeds)} runs of the graph", fix="profile with a shorter one"
        )
    return feeds[0]


def _time(taken: list[float], run: Callable[..., Any], *given: Any) -> Any:
    begin = time.perf_counter()
    answer = run(*given)
    taken.append(time.perf_counter() - begin)
    return answer


@contextmanager
def _timed(owner: Any, method: str, taken: list[float]) -> Iterator[None]:
    """Time a method of one object in the very requests whose whole is timed."""
    setattr(owner, method, partial(_time, taken, getattr(owner, method)))
    try:
        yield
    finally:
        delattr(owner, method)


def by_kind(nodes: Iterable[tuple[str, str, str, float]]) -> list[Kernel]:
    """Put the runs of nodes together: the median of each node, the sum of each kind.

    Args:
        nodes: name, type, implementation and milliseconds of each run of each node.

    >>> by_kind([("a", "Add", "jit", 1.0), ("a", "Add", "jit", 3.0), ("b", "Add", "jit", 2.0)])
    [Kernel(kind='Add', implementation='jit', count=2, ms=4.0)]
    """
    runs: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for name, kind, implementation, ms in nodes:
        runs[name, kind, implementation].append(ms)
    kinds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (_, kind, implementation), times in runs.items():
        kinds[kind, implementation].append(median(times))
    found = [
        Kernel(kind=kind, implementation=implementation, count=len(times), ms=sum(times))
        for (kind, implementation), times in kinds.items()
    ]
    return sorted(found, key=lambda kernel: -kernel.ms)


def openvino_kernels(compiled: Any, inputs: Sequence[Any], runs: int) -> list[Kernel]:
    """Return the kernels of a model that was compiled with PERF_COUNT."""
    request = compiled.create_infer_request()
    nodes = []
    for run in range(2 * runs):
        request.infer(inputs, share_inputs=True, share_outputs=True)
        if run >= runs:
            nodes += [
                (i.node_name, i.node_type, i.exec_type, i.real_time.total_seconds() * 1e3)
                for i in request.profiling_info
                if i.status.name == "EXECUTED"
            ]
    return by_kind(nodes)


def onnx_kernels(
    open_session: Callable[[Path], Any], output: str, feed: Feed, runs: int
) -> list[Kernel]:
    """Return the kernels that ONNX Runtime's profiler tells of.

    Args:
        open_session: opens a session that writes its profile to files of this prefix.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(Path(folder) / "profile")
        for _ in range(runs):
            session.run([output], dict(feed))
        told = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    end = "_kernel_time"
    return by_kind(
        (e["name"], e["args"]["op_name"], e["args"].get("provider", ""), e["dur"] / 1e3)
        for e in told
        if e.get("cat") == "Node" and e["name"].endswith(end)
    )
