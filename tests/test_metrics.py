"""Latencies, counters and memory as Prometheus metrics, at next to no cost."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from memopt import ArrowEngine, metrics
from memopt.bundle import Bundle
from memopt.runtimes.testing import fake_engine


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
    assert found["memory_usage_bytes", ()] > 1_000_000
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
