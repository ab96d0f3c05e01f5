"""The names of the founding design, which forward to what does the work; nothing is done here.

>>> from memopt.compat import QuantizationConfig
>>> QuantizationConfig(quant_type="int8", calibration_method="ptq").per_channel
True
"""

from __future__ import annotations

from memopt.onuse import names_on_use

_HOMES = {
    "engine": ("ArrowEngine", "AcceleratedProvider", "CPUBackend", "GPUBackend"),
    "weights": (
        "ArrowQuantizer",
        "PrecisionValidator",
        "QuantizationConfig",
        "ValidationResult",
        "WeightLoaderV2",
    ),
    "memory": (
        "ConsolidationConfig",
        "ConsolidationWorker",
        "HotColdTiering",
        "MemoryStats",
        "MultimodalRetriever",
    ),
    "sync": ("DeltaSyncConfig", "DeltaSyncManager", "SyncMetrics"),
    "settings": ("OptimizationConfig",),
    "bench": ("BenchmarkMetrics", "BenchmarkRunner"),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)
__getattr__ = names_on_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return list(__all__)
