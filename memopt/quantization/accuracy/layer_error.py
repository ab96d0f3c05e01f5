"""How far each layer's output in a quantized graph is from the float graph's, measured.

For methods that other libraries carry out and that say nothing of single layers. Both graphs run on
the same calibration inputs with the layers' outputs as extra outputs, so what the layers before
added is part of each number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from memopt.graphs.observe import observer, present, valid_rows
from memopt.quantization.method import Context, Layer

# Batches of calibration inputs, longest first: enough to tell layers apart.
BATCHES = 4


def with_errors(layers: Sequence[Layer], context: Context[Any], graph: Path) -> tuple[Layer, ...]:
    """Return the layers with their measured errors; those that have one already keep it.

    Args:
        layers: as a method made them; ``value`` names their output in both graphs.
        context: the float graph and the calibration inputs.
        graph: the quantized graph's file, of the float graph's format.
    """
    wanted = [item for item in layers if item.error is None and item.value and item.kind != "float"]
    if not wanted:
        return tuple(layers)
    context.step("error by layer")
    format = context.base.format
    there = present(graph, format, [str(item.value) for item in wanted])
    quantized, original = (observer(file, format, there) for file in (graph, context.graph))
    noise = dict.fromkeys(there, 0.0)
    power = dict.fromkeys(there, 0.0)
    for feed in islice(context.feeds(), BATCHES):
        for name, got, expected in zip(there, quantized(feed), original(feed), strict=True):
            a, b = valid_rows(got, feed), valid_rows(expected, feed)
            noise[name] += float(np.sum((a - b) ** 2, dtype=np.float64))
            power[name] += float(np.sum(b**2, dtype=np.float64))
    errors = {name: noise[name] / max(power[name], 1e-12) for name in there}
    return tuple(
        replace(item, error=errors[str(item.value)])
        if item in wanted and item.value in errors
        else item
        for item in layers
    )
