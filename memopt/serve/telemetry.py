"""What a server counts: memopt's own names, and those of Text Embeddings Inference."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from memopt import metrics
from memopt.extras import require
from memopt.runtimes.limits import resident_mb
from memopt.serve.guard import OPEN

# Seconds; as TEI's histograms.
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHOWN = 10  # seconds that the page's rate is of
_COUNTERS = {
    "te_request_count": ("Requests", "method"),
    "te_request_success": ("Requests answered", "method"),
    "te_request_failure": ("Requests refused or failed", "err"),
}
_KEPT = 512  # requests that the page's medians are of
# Not in the page's rate and medians: who looks at a server is not its work.
_WATCHING = frozenset((*OPEN, "/state", "/metrics", "/info", "/v1/models", "/openapi.json"))


class Telemetry:
    """Counts and times of requests; ``host`` gives what is true this moment."""

    def __init__(self, host: Any) -> None:
        prom = require("prometheus_client", extra="serve", why="count requests")
        self._prom = prom
        self._host = host
        self.registry = prom.CollectorRegistry()
        metrics.PerformanceMonitor(self.registry)
        self.begun = time.time()

        def histogram(name: str, about: str, *labels: str) -> Any:
            return prom.Histogram(name, about, labels, buckets=_SECONDS, registry=self.registry)

        self._counts: Counter[tuple[str, str]] = Counter()
        self._duration = histogram("te_request_duration", "Seconds of a request", "method")
        self._queued = histogram("te_request_queue_duration", "Seconds in the queue", "model")
        self._computed = histogram(
            "te_request_inference_duration", "Seconds from leaving the queue to the answer", "model"
        )
        self._tokenized = histogram(
            "te_request_tokenization_duration", "Seconds of /tokenize; else within inference"
        )
        self.registry.register(self)
        self._times: deque[float] = deque(maxlen=_KEPT)
        self._seconds: dict[int, list[int]] = {}  # second -> answered, failed
        self._parts: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def collect(self) -> Iterator[Any]:
        """Yield what is true this moment; prometheus_client calls this at each scrape."""
        gauge = require("prometheus_client.core", extra="serve", why="count").GaugeMetricFamily
        waiting = gauge("te_queue_size", "Requests that wait", labels=["model"])
        size = gauge("te_batch_next_size", "Inputs of the last batch", labels=["model"])
        tokens = gauge("te_batch_next_tokens", "Tokens of the last batch, about", labels=["model"])
        for name, model in self._host.models.items():
            if model.opened is not None:
                batcher = model.opened.batcher
                waiting.add_metric([name], batcher.waiting)
                size.add_metric([name], batcher.last_size)
                tokens.add_metric([name], batcher.last_tokens)
        yield from (waiting, size, tokens)
        # TEI's counters have no _total, which prometheus_client would add to a Counter's name.
        unknown = require("prometheus_client.core", extra="serve", why="count").UnknownMetricFamily
        for name, (about, label) in _COUNTERS.items():
            family = unknown(name, about, labels=[label])
            for (known, value), count in list(self._counts.items()):
                if known == name:
                    family.add_metric([value], count)
            yield family

    def requested(self, method: str) -> None:
        """Count a request that came."""
        self._counts["te_request_count", method] += 1

    def answered(self, method: str, status: int, seconds: float) -> None:
        """Count what became of it."""
        if status < 400:
            self._counts["te_request_success", method] += 1
            self._duration.labels(method).observe(seconds)
        else:
            self._counts["te_request_failure", str(status)] += 1
        if method in _WATCHING:
            return
        if status < 400:
            self._times.append(seconds)
        now = int(time.time())
        if now not in self._seconds:
            self._seconds = {s: n for s, n in self._seconds.items() if now - s <= _SHOWN}
            self._seconds[now] = [0, 0]
        self._seconds[now][status >= 400] += 1

    def computed(self, model: str, queued: float, computed: float) -> None:
        """Time a request's two halves."""
        self._queued.labels(model).observe(queued)
        self._computed.labels(model).observe(computed)
        self._parts.append((queued, computed))

    def tokenized(self, seconds: float) -> None:
        """Time a request for tokens."""
        self._tokenized.observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format: the server's and memopt's own."""
        return bytes(self._prom.generate_latest(self.registry))

    def now(self) -> dict[str, Any]:
        """Return what the page shows: rate, medians in ms, fill, providers, fallbacks."""
        moment = time.time()
        recent = [n for s, n in self._seconds.items() if 0 < int(moment) - s <= _SHOWN]
        done = sorted(self._times)
        halves = list(self._parts)[-200:]

        def middle(values: list[float]) -> float:
            return round(1e3 * sorted(values)[len(values) // 2], 3) if values else 0.0

        models = []
        for name, model in self._host.models.items():
            opened = model.opened
            about: dict[str, Any] = {"name": name, "task": model.task.name, "open": bool(opened)}
            if opened is not None:
                info = opened.engine.device_info()
                about |= {key: info.get(key) for key in ("device", "variant", "runtime")}
                about |= {"fill": round(opened.batcher.fill, 3), "queue": opened.batcher.waiting}
                about["fallbacks"] = [str(event) for event in opened.engine.events]
            models.append(about)
        return {
            "uptime_seconds": round(moment - self.begun),
            "requests_per_second": sum(map(sum, recent)) / _SHOWN,
            "failures_per_second": sum(failed for _, failed in recent) / _SHOWN,
            "p50_ms": middle(done),
            "p99_ms": round(1e3 * done[int(len(done) * 0.99)], 3) if done else 0.0,
            "queue_ms": middle([q for q, _ in halves]),
            "compute_ms": middle([c for _, c in halves]),
            "rss_mb": round(resident_mb(), 1),
            "memory_limit_mb": self._host.limits.memory_limit_mb,
            "models": models,
        }
