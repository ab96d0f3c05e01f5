"""transformers' own mends for models that torch alone cannot turn into a graph.

``transformers.exporters`` (5.23) swaps what torch's exporter stumbles over, while a model is
traced, and translates some operators itself. They are private there; this is the one place that
uses them. What comes out is checked like any other graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Mends:
    """``translations`` of operators for torch's exporter, and what ``finish`` does after it."""

    translations: dict[Any, Any]
    finish: Callable[[Any], None]


@contextmanager
def mended() -> Iterator[Mends | None]:
    """Apply the mends while the block runs; None where this transformers has none."""
    try:
        from transformers.exporters.exporter_onnx import (
            _ONNX_TRANSLATION_TABLE,
            apply_onnx_ir_fixes,
        )
        from transformers.exporters.utils import apply_patches
    except ImportError:
        yield None
        return
    with ExitStack() as stack:
        for backend in ("dynamo", "onnx"):
            stack.enter_context(apply_patches(backend))
        yield Mends(_ONNX_TRANSLATION_TABLE, apply_onnx_ir_fixes)
