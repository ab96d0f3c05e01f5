"""Two sets of weights side by side: what a push would send, with each codec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memopt.federation.delta.adapters import read_weights
from memopt.federation.delta.compute import compute_delta, full_payload
from memopt.federation.delta.settings import LOSSY, DeltaSettings


def compare(old: str | Path, new: str | Path, *, delta_threshold: float = 0.01) -> dict[str, Any]:
    """Return, as plain JSON, each tensor's change and each codec's bytes, saving and error.

    Args:
        old, new: PEFT folder, .safetensors or .parquet.
        delta_threshold: relative mean change over which a tensor is sent.

    Raises:
        SyncError: nothing to compare at a path.
    """
    before, after = read_weights(old), read_weights(new)
    codecs = []
    tensors: list[dict[str, Any]] = []
    for codec in ("lossless", *LOSSY):
        settings = DeltaSettings(
            codec=codec, delta_threshold=delta_threshold, full_ratio=float("inf")
        )
        delta = compute_delta(before, after, settings)
        codecs.append(_row(codec, delta))
        tensors = [
            {
                "name": t.name,
                "action": t.action,
                "change": None if t.change == float("inf") else t.change,
            }
            for t in delta.tensors
        ]
    codecs.append(_row("full + zstd", full_payload(after)))
    changed = {t["name"] for t in tensors}
    tensors += [
        {"name": name, "action": "unchanged", "change": 0.0}
        for name in sorted(after)
        if name not in changed
    ]
    return {"tensors": tensors, "codecs": codecs}


def _row(codec: str, delta: Any) -> dict[str, Any]:
    return {
        "codec": codec,
        "kind": delta.kind,
        "bytes": len(delta.payload),
        "saving": delta.saving,
        "error": delta.error,
    }
