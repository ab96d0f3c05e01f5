"""Counters, latencies and memory, kept in plain Python and handed to Prometheus on request.

Recording costs about a microsecond and needs nothing installed; prometheus-client is imported
when a :class:`PerformanceMonitor` is made.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from memopt.extras import require

# Seconds: from a single sentence of a small model on a GPU to a batch of audio on a small CPU.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
FALLBACK_EVENTS = "memopt_fallback_events_total"
ERRORS = "memopt_errors_total"

log = logging.getLogger("memopt.inference")
_fallbacks = logging.getLogger("memopt.runtimes")
_lock = threading.Lock()
_counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()


def _after_fork() -> None:
    """In a child of fork(): a thread of the parent may have held the lock."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(slots=True)
class _Latency:
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    requests: int = 0
    inputs: int = 0
    seconds: float = 0.0


_latencies: dict[tuple[str, str], _Latency] = {}
_gauges: dict[tuple[str, tuple[tuple[str, str], ...]], Callable[[], float | None]] = {}


def count(name: str, amount: int = 1, **labels: str) -> None:
    """Add ``amount`` to the counter ``name`` with these labels; safe from any thread.

    >>> count("memopt_example_total", kind="doc")
    >>> value("memopt_example_total", kind="doc")
    1
    """
    with _lock:
        _counts[name, tuple(sorted(labels.items()))] += amount


def value(name: str, **labels: str) -> int:
    """Return the counter's value, 0 when it was never raised."""
    with _lock:
        return _counts[name, tuple(sorted(labels.items()))]


def observe(seconds: float, *, device: str, variant: str, batch_size: int) -> None:
    """Record one request: its latency, and at log level INFO one structured line.

    >>> observe(0.002, device="cpu", variant="doc", batch_size=3)
    >>> snapshot()["cpu", "doc"]["requests"]
    1
    """
    with _lock:
        record = _latencies.get((device, variant))
        if record is None:
            record = _latencies[device, variant] = _Latency()
        record.buckets[bisect_left(BUCKETS, seconds)] += 1
        record.requests += 1
        record.inputs += batch_size
        record.seconds += seconds
    if log.isEnabledFor(logging.INFO):
        fields = {
            "latency_ms": round(seconds * 1000, 3),
            "device": device,
            "batch_size": batch_size,
            "variant": variant,
        }
        log.info("inference %s", json.dumps(fields), extra=fields)


def gauge(name: str, read: Callable[[], float | None], **labels: str) -> None:
    """Say how to read the gauge ``name`` (bytes) with these labels; None means not known now."""
    with _lock:
        _gauges[name, tuple(sorted(labels.items()))] = read


def fallback(from_: str, to: str, reason: str, *, told: str = "") -> None:
    """Count a hand-over, and log it as a warning with ``from``, ``to`` and ``reason`` as fields.

    Args:
        from_, to: what could not do it, and what took over: providers, delta and full, ...
        reason: one word, a label of the metric.
        told: the whole story, for the log line.

    >>> fallback("delta", "full", "doc")
    >>> value(FALLBACK_EVENTS, **{"from": "delta", "to": "full", "reason": "doc"})
    1
    """
    fields = {"from": from_, "to": to, "reason": reason}
    count(FALLBACK_EVENTS, 1, **fields)
    _fallbacks.warning("fallback %s", told or f"{from_} -> {to} ({reason})", extra=fields)


@contextlib.contextmanager
def errors(component: str) -> Iterator[None]:
    """Count what is raised inside, by ``component`` and the error's class; it is raised on.

    A class of :mod:`memopt.errors` stands for its kinds elsewhere in the house.

    >>> with contextlib.suppress(OSError), errors("doc"):
    ...     raise OSError
    >>> value(ERRORS, component="doc", error="OSError")
    1
    """
    try:
        yield
    except Exception as error:
        kinds = type(error).__mro__
        known = (kind.__name__ for kind in kinds if kind.__module__ == "memopt.errors")
        count(ERRORS, component=component, error=next(known, type(error).__name__))
        raise


def snapshot() -> dict[tuple[str, str], dict[str, float]]:
    """Return requests, inputs and seconds by (device, variant)."""
    with _lock:
        return {
            key: {"requests": r.requests, "inputs": r.inputs, "seconds": r.seconds}
            for key, r in _latencies.items()
        }


class JsonFormatter(logging.Formatter):
    """One JSON object per log line, with the fields of :func:`observe` and :func:`fallback`.

    >>> record = logging.LogRecord("memopt.inference", 20, "", 0, "done", None, None)
    >>> sorted(json.loads(JsonFormatter().format(record)))
    ['level', 'logger', 'message', 'time']
    """

    _FIELDS = ("latency_ms", "device", "batch_size", "variant", "from", "to", "reason")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in self._FIELDS if hasattr(record, name)}
        return json.dumps(line)


class PerformanceMonitor:
    """Everything recorded in this process, as Prometheus metrics.

    ``inference_latency_seconds{device,variant}`` (histogram), ``inference_requests_total``,
    ``inference_inputs_total``, ``memory_usage_bytes{component}``, ``vram_usage_bytes{device}`` and
    every counter: ``memopt_fallback_events_total{from,to,reason}``,
    ``memopt_errors_total{component,error}``, ``memopt_model_calls_total{component,model,outcome}``,
    ``memopt_consolidation_*_total``, ``memopt_sync_*_total``. Numbers are read when scraped.

    Args:
        registry: a prometheus_client CollectorRegistry; None makes one of its own.

    Raises:
        MissingExtra: prometheus-client is not installed.

    >>> count(FALLBACK_EVENTS, 1, **{"from": "cuda", "to": "cpu", "reason": "open"})
    >>> 'from="cuda"' in PerformanceMonitor().text()
    True
    """

    def __init__(self, registry: Any = None) -> None:
        self._client = require("prometheus_client", extra="serve", why="export metrics")
        self.registry = registry or self._client.CollectorRegistry()
        self.registry.register(self)

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        found: str = self._client.generate_latest(self.registry).decode()
        return found

    def close(self) -> None:
        """Take the metrics out of the registry."""
        self.registry.unregister(self)

    def collect(self) -> Iterator[Any]:
        """Yield metric families; prometheus_client calls this at each scrape."""
        core = require("prometheus_client.core", extra="serve", why="export metrics")
        with _lock:
            counts = dict(_counts)
            gauges = dict(_gauges)
            latencies = {
                key: (list(r.buckets), r.requests, r.inputs, r.seconds)
                for key, r in _latencies.items()
            }
        labels = ["device", "variant"]
        histogram = core.HistogramMetricFamily(
            "inference_latency_seconds", "Seconds per encode request", labels=labels
        )
        requests = core.CounterMetricFamily("inference_requests", "Encode requests", labels=labels)
        inputs = core.CounterMetricFamily("inference_inputs", "Inputs encoded", labels=labels)
        for key, (buckets, number, items, seconds) in latencies.items():
            total, cumulative = 0, []
            for bound, amount in zip([*map(str, BUCKETS), "+Inf"], buckets, strict=True):
                total += amount
                cumulative.append((bound, total))
            histogram.add_metric(key, cumulative, seconds)
            requests.add_metric(key, number)
            inputs.add_metric(key, items)
        yield from (histogram, requests, inputs)
        yield from _families(core.CounterMetricFamily, counts)
        now = {key: read() for key, read in gauges.items()}
        known = {key: size for key, size in now.items() if size is not None}
        yield from _families(core.GaugeMetricFamily, known)


def _families(kind: Any, numbers: Mapping[tuple[str, Any], float]) -> Iterator[Any]:
    families: dict[str, Any] = {}
    for (name, pairs), number in sorted(numbers.items()):
        if name not in families:
            labels = [label for label, _ in pairs]
            families[name] = kind(name.removesuffix("_total"), name, labels=labels)
        families[name].add_metric([value for _, value in pairs], number)
    yield from families.values()
