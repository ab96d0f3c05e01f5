"""A benchmark of one model, in the founding design's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.benchmark import runner
from memopt.benchmark.peers import Contender
from memopt.benchmark.record import hardware
from memopt.compat.engine import _bundle_of
from memopt.compat.weights import perplexities
from memopt.errors import InputError
from memopt.files import atomic_path

if TYPE_CHECKING:
    from memopt.compat.settings import OptimizationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkMetrics:
    """What was measured; a language model has a perplexity and no vectors to time."""

    model_name: str
    optimization_strategy: str
    device: str
    model_load_time_ms: float | None = None
    single_inference_latency_ms: float | None = None
    p50_latency_ms: float | None = None
    p95_latency_ms: float | None = None
    p99_latency_ms: float | None = None
    batch_throughput_rps: float | None = None
    memory_usage_mb: float | None = None
    vram_usage_mb: float | None = None
    cosine_similarity: float | None = None
    ppl: float | None = None
    hardware_info: Mapping[str, Any] = field(default_factory=dict)
    timestamp: datetime = field(default_factory=lambda: datetime.now(UTC))


class BenchmarkRunner:
    """Runs :mod:`memopt.benchmark` and writes one JSON file a run."""

    def __init__(self, output_dir: str | Path = "./benchmark_results") -> None:
        self.output_dir = Path(output_dir)

    def run_benchmark(
        self,
        model_path: str | Path,
        test_texts: Sequence[str],
        optimization_config: OptimizationConfig,
    ) -> BenchmarkMetrics:
        """Measure a bundle, or quantized weights in one, on texts.

        Raises:
            InputError: no texts.
            MemoptError: the model cannot be opened on that device.
        """
        texts = list(test_texts)
        if not texts:
            raise InputError("no texts to measure with", fix="give some")
        bundle, variant = _bundle_of(model_path)
        device = optimization_config.settings().device.target
        told: dict[str, Any] = {
            "model_name": bundle.path.name,
            "optimization_strategy": variant or "auto",
            "device": device,
            "hardware_info": hardware(),
        }
        if bundle.manifest.task == "text-generation":
            found = BenchmarkMetrics(ppl=perplexities(bundle, variant, texts)[1], **told)
        else:
            found = self._encoder(bundle, variant or "auto", device, texts, told)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        name = f"benchmark_{found.model_name}_{found.timestamp:%Y%m%dT%H%M%S%f}.json"
        document = asdict(found) | {"timestamp": found.timestamp.isoformat()}
        with atomic_path(self.output_dir / name) as path:
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return found

    def _encoder(
        self, bundle: Any, variant: str, device: str, texts: list[str], told: dict[str, Any]
    ) -> BenchmarkMetrics:
        path = str(bundle.path.absolute())

        def contender(name: str, on: str) -> Contender:
            spec = {"kind": "memopt", "path": path, "variant": name, "device": on}
            return Contender(label=f"memopt {name}", spec=spec)

        has_float = "onnx-fp32" in bundle.manifest.variants and variant != "onnx-fp32"
        reference = contender("onnx-fp32", "cpu") if has_float else None
        singles = min(100, len(texts))
        record = runner.run(
            [contender(variant, device)], texts, singles=singles, reference=reference
        )[0]
        return BenchmarkMetrics(
            model_load_time_ms=record.load_seconds * 1000,
            single_inference_latency_ms=record.latency_ms_p50,
            p50_latency_ms=record.latency_ms_p50,
            p95_latency_ms=record.latency_ms_p95,
            p99_latency_ms=record.latency_ms_p99,
            batch_throughput_rps=record.items_per_second,
            memory_usage_mb=record.rss_mb,
            vram_usage_mb=record.vram_mb,
            cosine_similarity=record.cosine_mean,
            **told,
        )
