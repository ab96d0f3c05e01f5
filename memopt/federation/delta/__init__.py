"""Weights as arrays, what changed between them, and the bytes that say so."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("apply_delta", "compute_delta"):
        from memopt.federation.delta import compute

        return getattr(compute, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
