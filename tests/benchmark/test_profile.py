"""bench --profile: the parts of one input's time add up, and the kernels are the runtime's own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memopt import ArrowEngine, Bundle
from memopt.benchmark import profile as told
from memopt.benchmark.bench import profiles
from memopt.benchmark.report import write_html
from memopt.benchmark.runner import run
from memopt.cli import app
from memopt.errors import ConfigurationError
from memopt.runtimes import profile as measured
from memopt.runtimes.profile import by_kind, profile_one
from memopt.runtimes.testing import fake_engine

TEXT = "a cat sleeps on the warm keyboard"


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("RUNS", 5), ("WARM", 2), ("PROFILED", 3)):
        monkeypatch.setattr(measured, name, count)


def test_what_cannot_be_profiled_is_said_before_minutes_are_measured(
    minilm: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured already was thrown away with the refusal."""

    def refuse(*_: object, **__: object) -> None:
        raise ConfigurationError("no profiler here")

    def too_early(*_: object, **__: object) -> None:
        raise AssertionError("measured before it was known whether it can be profiled")

    monkeypatch.setattr("memopt.benchmark.bench.profiles", refuse)
    monkeypatch.setattr("memopt.benchmark.bench.bench", too_early)
    done = CliRunner().invoke(app, ["bench", str(minilm.path), "--profile"])
    assert isinstance(done.exception, ConfigurationError), done.exception


@pytest.mark.parametrize(
    ("variant", "kind"), [("openvino-fp32", "FullyConnected"), ("onnx-fp32-fused", "Attention")]
)
def test_the_parts_are_those_of_the_request(minilm: Bundle, variant: str, kind: str) -> None:
    """Every part is told, none is more than the whole, and the products are among the kernels."""
    with ArrowEngine(minilm, variant=variant) as engine:
        before = engine.encode([TEXT])
        found = profile_one(engine, TEXT)
        assert (engine.encode([TEXT]) == before).all()  # nothing is left in the engine
        assert "run" not in vars(engine._chain.backend)
    assert list(found.stages) == ["tokenize", "python", "bind and copy", "session"]
    assert all(0 <= ms <= 2 * found.total_ms for ms in found.stages.values())
    assert any(kind in kernel.kind for kernel in found.kernels)
    assert sum(kernel.count for kernel in found.kernels) > 20
    times = [kernel.ms for kernel in found.kernels]
    assert times == sorted(times, reverse=True)
    assert sum(ms for _, ms in found.shares()) == pytest.approx(found.stages["session"])
    assert sum(part[3] for part in told.parts(found)) == pytest.approx(sum(found.stages.values()))


def test_a_runtime_without_a_profiler_is_refused() -> None:
    """It is named, with what can be profiled."""
    with fake_engine() as engine, pytest.raises(ConfigurationError, match="cpu:fake cannot be"):
        profile_one(engine, TEXT)


def test_runs_of_a_node_are_a_median_and_nodes_of_a_kind_a_sum() -> None:
    """One slow run of a shared machine changes nothing."""
    nodes = [("a", "Add", "x", 1.0), ("a", "Add", "x", 9.0), ("a", "Add", "x", 1.0)]
    kernels = by_kind([*nodes, ("b", "Add", "x", 2.0), ("c", "Mul", "x", 9.0)])
    assert [(k.kind, k.count, k.ms) for k in kernels] == [("Mul", 1, 9.0), ("Add", 2, 3.0)]


def test_the_profile_is_in_the_report(minilm: Bundle, tmp_path: Path) -> None:
    """A picture and a table; and it is plain JSON."""
    spec = {"kind": "memopt", "path": str(minilm.path), "variant": "auto"}
    from memopt.benchmark.peers import Contender

    records = run([Contender(label="minilm", spec=spec)], [TEXT], rounds=1, singles=1)
    found = profiles(minilm.path, ["auto"], count=3)
    write_html(records, tmp_path / "page.html", found)
    page = (tmp_path / "page.html").read_text()
    assert "Where one input's time goes" in page.replace("&#x27;", "'")
    assert "bind and copy" in page
    assert json.loads(json.dumps(asdict(found[0])))["stages"]["session"] >= 0
