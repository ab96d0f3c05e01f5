"""ONNX Runtime's optimized graph, kept beside the model so that the next open is fast.

The graph is stored after optimization with its weights in a file of their own, already packed the
way this processor's kernels want them. ONNX Runtime maps that file: a second open neither
optimizes nor copies, and every session and process of one model shares the same pages.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memopt.bundle import Variant
from memopt.files import publish, staged_directory
from memopt.runtimes.cpu import cpu_features
from memopt.runtimes.cpu_graph import REVISION, split_skip_layer_norm
from memopt.runtimes.limits import lacks_memory

log = logging.getLogger("memopt.runtimes")
FOLDER = ".ort-cache"
SWITCH = "MEMOPT_GRAPH_CACHE"  # set to 0 to open models without it
# onnxruntime's own fallback prints to standard output, where a command's JSON goes, and tells
# nobody else.
_CPU: dict[str, Any] = {"providers": ["CPUExecutionProvider"], "enable_fallback": False}
# Smaller tensors stay in the graph: shapes and constants that optimization itself reads.
_FEWEST_BYTES = "1024"


def open_cached(
    model: Path, variant: Variant, options: Callable[[], Any], version: str
) -> Any | None:
    """Return a CPU session over the cached graph of ``model``, making it when it is not there.

    Args:
        model: the graph file of ``variant``.
        options: makes fresh session options, without caching.
        version: of onnxruntime.

    Returns:
        None where the folder cannot be written or caching is switched off: open the model itself.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    path = model.parent / FOLDER / f"{model.stem}-{_key(model, variant, version)}.onnx"
    if not path.is_file():
        try:
            _make(model, path, options())
        except Exception as error:  # noqa: BLE001 - a model that cannot be cached can be opened
            # A model that cannot be opened at all says so when it is opened.
            log.debug("no graph cache for %s: %s", model, error)
            return None
    try:
        return _open(path, options())
    except Exception as error:  # noqa: BLE001 - a damaged cache costs time, never the answer
        if lacks_memory(error):
            log.warning("the graph cache %s could not be used: %s", path, error)
            return None
        log.warning("the graph cache %s is damaged and was removed: %s", path, error)
        _remove(path)
        return None


def _key(model: Path, variant: Variant, version: str) -> str:
    """Return what must be equal for a cached graph to be the right one."""
    parts = [version, REVISION, "CPUExecutionProvider", *sorted(cpu_features())]
    folder = model.parents[len(Path(variant.file).parts) - 1]
    for name in (variant.file, *variant.companions):
        stat = (folder / name).stat()
        parts += [name, str(stat.st_size), str(stat.st_mtime_ns)]
    parts += [f"{key}={value}" for key, value in sorted(variant.options.items())]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _make(model: Path, path: Path, options: Any) -> None:
    import onnxruntime as ort

    with staged_directory(path.parent) as folder:
        graph, weights = folder / path.name, folder / f"{path.stem}.bin"
        options.optimized_model_filepath = str(graph)
        for key, value in (
            ("session.optimized_model_external_initializers_file_name", weights.name),
            ("session.optimized_model_external_initializers_min_size_in_bytes", _FEWEST_BYTES),
            # Weights are stored as the kernels want them: nothing is packed or copied at open.
            ("session.save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(key, value)
        ort.InferenceSession(str(model), options, **_CPU)
        split_skip_layer_norm(graph)
        # Weights first: a graph is never there without them.
        if weights.is_file():
            publish(weights, path.with_suffix(".bin"))
        publish(graph, path)
    # What another version or an older model left is of no use any more.
    for old in path.parent.glob(f"{model.stem}-*.onnx"):
        if old != path and len(old.stem) == len(path.stem):
            _remove(old)


def _open(path: Path, options: Any) -> Any:
    import onnxruntime as ort

    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, **_CPU)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".bin").unlink(missing_ok=True)
