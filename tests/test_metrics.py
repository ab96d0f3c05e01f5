"""Latencies, counters and memory as Prometheus metrics, at next to no cost."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from memopt import ArrowEngine, metrics
from memopt.bundle import Bundle
from memopt.errors import DeviceError
from memopt.runtimes.testing import FakeBackend, fake_engine


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_show_up_in_prometheus_format() -> None:
    """Histogram, requests, inputs, memory: as Prometheus' own parser reads them."""
    monitor = metrics.PerformanceMonitor()
    labels = (("device", "cpu"), ("variant", "fake"))
    before = samples(monitor.text()).get(("inference_requests_total", labels), 0)
    with fake_engine(8) as engine:
        engine.encode(["a", "b"])
        engine.encode(["c"])
    found = samples(monitor.text())
    assert found["inference_requests_total", labels] == before + 2
    assert found["inference_latency_seconds_count", labels] == before + 2
    assert found["inference_latency_seconds_sum", labels] > 0
    infinite = tuple(sorted((*labels, ("le", "+Inf"))))
    assert found["inference_latency_seconds_bucket", infinite] == before + 2
    assert found["memory_usage_bytes", (("component", "process"),)] > 1_000_000
    monitor.close()


def test_a_latency_falls_into_its_bucket() -> None:
    """Prometheus buckets are cumulative and include their upper bound."""
    for seconds in (0.001, 0.002, 99.0):
        metrics.observe(seconds, device="d", variant="buckets", batch_size=1)
    monitor = metrics.PerformanceMonitor()
    found = samples(monitor.text())
    for bound, expected in (("0.0005", 0), ("0.001", 1), ("0.0025", 2), ("10.0", 2), ("+Inf", 3)):
        key = (("device", "d"), ("le", bound), ("variant", "buckets"))
        assert found["inference_latency_seconds_bucket", key] == expected


def test_fallbacks_are_a_counter_with_labels() -> None:
    """memopt_fallback_events_total{from,to,reason}."""
    labels = {"from": "x", "to": "y", "reason": "open"}
    metrics.count(metrics.FALLBACK_EVENTS, 2, **labels)
    found = samples(metrics.PerformanceMonitor().text())
    assert found[metrics.FALLBACK_EVENTS, tuple(sorted(labels.items()))] == 2


def test_a_fallback_is_told_with_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    """The warning carries from, to and reason, and JsonFormatter writes them."""
    with caplog.at_level(logging.WARNING, "memopt.runtimes"):
        metrics.fallback("cuda", "cpu", "memory", told="the GPU is full")
    line = json.loads(metrics.JsonFormatter().format(caplog.records[-1]))
    assert (line["from"], line["to"], line["reason"]) == ("cuda", "cpu", "memory")
    assert line["message"] == "fallback the GPU is full"


def test_consolidation_and_model_calls_are_counted(tmp_path: Path) -> None:
    """Runs, summaries, calls by outcome, the hand-over to extraction: as Prometheus reads them."""
    from memopt.memory.lifecycle.backends import Refused
    from memopt.memory.lifecycle.consolidation import consolidate
    from memopt.memory.lifecycle.llm import LanguageModel
    from memopt.memory.memory_store import MemoryStore
    from memopt.memory.model.schema import Content, NewMemory

    def refuse(system: str, prompt: str) -> str:
        raise Refused("no", passing=False)

    def number(name: str, **labels: str) -> float:
        found = samples(metrics.PerformanceMonitor().text())
        return found.get((name, tuple(sorted(labels.items()))), 0)

    model = {"component": "consolidation", "model": "deaf", "outcome": "refused"}
    before = number("memopt_consolidation_summaries_total")
    with MemoryStore(tmp_path / "s", dim=2) as store:
        new = [
            NewMemory(content=Content(text=f"The door is red{mark}"), embedding=np.array([1.0, 0]))
            for mark in ".!"
        ]
        store.touch(list(store.add(new).ids) * 10)
        consolidate(store, llm=LanguageModel("deaf", refuse))
    assert number("memopt_consolidation_summaries_total") == before + 1
    assert number("memopt_model_calls_total", **model) == 1
    handed = {"from": "deaf", "to": "extractive", "reason": "llm"}
    assert number(metrics.FALLBACK_EVENTS, **handed) == 1


def test_errors_are_counted_by_component() -> None:
    """An engine that fails for good counts one error of inference."""

    def broken(run: int) -> None:
        raise RuntimeError("dead")

    labels = {"component": "inference", "error": "DeviceError"}
    before = metrics.value(metrics.ERRORS, **labels)
    with (
        fake_engine(8, open_backend=lambda _: FakeBackend(8, fail=broken)) as engine,
        pytest.raises(DeviceError),
    ):
        engine.encode(["a"])
    assert metrics.value(metrics.ERRORS, **labels) == before + 1


def test_log_lines_are_structured(caplog: pytest.LogCaptureFixture) -> None:
    """Each request logs latency_ms, device, batch_size and variant; JsonFormatter writes them."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(metrics.JsonFormatter())
    metrics.log.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "memopt.inference"), fake_engine(8) as engine:
            engine.encode(["a", "b", "c"])
    finally:
        metrics.log.removeHandler(handler)
    line = json.loads(stream.getvalue())
    assert line["latency_ms"] > 0
    assert (line["device"], line["batch_size"], line["variant"]) == ("cpu", 3, "fake")


@pytest.mark.performance
def test_recording_costs_less_than_one_percent_of_the_smallest_request(minilm: Bundle) -> None:
    """What is recorded per request is below 1 % of one short sentence, measured in the same run."""
    with ArrowEngine(minilm) as engine:
        engine.encode("a")
        request = fastest(lambda: engine.encode("a"), 50)
    record = fastest(
        lambda: metrics.observe(0.001, device="cpu", variant="overhead", batch_size=1), 2_000
    )
    assert record < 0.01 * request


def fastest(work: Callable[[], object], times: int) -> float:
    """Return the seconds of one call, from the fastest of five rounds."""
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(times):
            work()
        best = min(best, (time.perf_counter() - begin) / times)
    return best
