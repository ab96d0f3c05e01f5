"""The names of the founding design, which forward to what does the work; nothing is done here.

>>> from memopt.compat import QuantizationConfig
>>> QuantizationConfig(quant_type="int8", calibration_method="ptq").per_channel
True
"""

from __future__ import annotations

import importlib
from typing import Any

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
_FOUND = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_FOUND)


def __getattr__(name: str) -> Any:
    if name in _FOUND:
        return getattr(importlib.import_module(f"memopt.compat.{_FOUND[name]}"), name)
    raise AttributeError(f"module 'memopt.compat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
