"""What ``export`` asks of a family of models, for all that answer at once: encoders and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memopt.bundle import Variant
from memopt.exporters import check
from memopt.exporters.check import Run, Tolerance
from memopt.exporters.fuse import FusionReport, fuse
from memopt.exporters.interface import (
    check_shapes,
    example,
    load_model,
    reference,
    signature,
    trace_shape,
    wrap,
)
from memopt.runtimes.torch_model import LoadedModel

__all__ = [
    "check_shapes",
    "compare",
    "example",
    "faster",
    "finish",
    "load_model",
    "portable",
    "reference",
    "signature",
    "trace_shape",
    "wrap",
]


def portable(graph: Any) -> Any:
    """Return the graph in standard operators: it is one already."""
    return graph


def faster(graph: Any, config: Mapping[str, Any]) -> tuple[Any, FusionReport]:
    """Return the graph with ONNX Runtime's fused operators, and which it got."""
    return fuse(graph, config)


def finish(variant: Variant, bundle: Path, staged: Path) -> Variant:
    """Return the variant with the further files that others need to open it: none."""
    del bundle, staged
    return variant


def compare(
    run: Run, loaded: LoadedModel, cases: Sequence[Any], tolerance: Tolerance, name: str
) -> dict[str, Any]:
    """Run a graph on every case and return the record for the manifest.

    Raises:
        ExportError: it gives other answers than torch.
    """
    del loaded
    return check.compare(run, cases, tolerance, name=name)
