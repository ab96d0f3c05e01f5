"""Adapter weights as signed deltas over Arrow Flight.

The names below are imported on use, so that ``import memopt.federation`` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

from memopt.extras import require

require("pyarrow.flight", extra="federation", why="sync weights")

_EXPORTS = {
    "DeltaSyncManager": "memopt.federation.manager",
    "DeltaSettings": "memopt.federation.delta_settings",
    "compute_delta": "memopt.federation.delta",
    "apply_delta": "memopt.federation.delta",
    "read_weights": "memopt.federation.adapters",
    "write_weights": "memopt.federation.adapters",
    "weights_hash": "memopt.federation.arrays",
    "Limits": "memopt.federation.limits",
    "SyncServer": "memopt.federation.server",
    "SyncClient": "memopt.federation.client",
    "aggregate": "memopt.federation.aggregate",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
