"""What a graph of somebody else says of itself, whatever its dialect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memopt.runtimes.engines.graph import Port

# Numbers of weights by type -> what the graph is told as. Integers of other widths are shapes.
_PRECISIONS = {
    **dict.fromkeys(("float32", "float64"), "fp32"),
    "float16": "fp16",
    "bfloat16": "bf16",
    **dict.fromkeys(("int8", "uint8"), "int8"),
    **dict.fromkeys(("int4", "uint4"), "int4"),
    **dict.fromkeys(("int2", "uint2"), "int2"),
    "nf4": "nf4",
}
# Smaller constants are shapes and scales.
FEWEST_VALUES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFile:
    """A graph's file.

    Attributes:
        path: of the graph.
        format: onnx or openvino.
        inputs, outputs: of the graph, in its order.
        precision: of most of its weights.
        quantization: how its integers are used, "" for a float graph.
        version: of the file format: ONNX's IR, OpenVINO's.
        opset: of ONNX's own operators, None for OpenVINO.
        producer: what wrote it, as it says.
        beside: files that belong to it, relative to its folder.
        fused: whether it has operators that only ONNX Runtime knows.
        rows: of the table that token ids are looked up in; None where none is seen.
    """

    path: Path
    format: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    precision: str
    quantization: str
    version: int
    opset: int | None
    producer: str
    beside: tuple[str, ...] = ()
    fused: bool = False
    rows: int | None = None

    def record(self) -> dict[str, Any]:
        """Return what the manifest keeps."""
        return {
            "format": self.format,
            "version": self.version,
            "opset": self.opset,
            "producer": self.producer,
            "precision": self.precision,
            "quantization": self.quantization,
            "inputs": [_port(port) for port in self.inputs],
            "outputs": [_port(port) for port in self.outputs],
        }

    def __str__(self) -> str:
        opset = f"opset {self.opset}, " if self.opset else ""
        quantized = f" ({self.quantization})" if self.quantization else ""
        return (
            f"{self.format}, {opset}version {self.version}, {self.precision}{quantized}; takes "
            f"{'; '.join(map(str, self.inputs))}; gives {'; '.join(map(str, self.outputs))}"
        )


def storable(values: np.ndarray) -> np.ndarray:
    """Return values in a type that weight files have: narrow integers one a byte.

    >>> import ml_dtypes
    >>> storable(np.array([-8, 7], ml_dtypes.int4)).dtype
    dtype('int8')
    """
    name = values.dtype.name
    if name in ("int4", "int2"):
        return values.astype(np.int8)
    if name in ("uint4", "uint2"):
        return values.astype(np.uint8)
    if name.startswith("float") and values.dtype.itemsize == 1 and name not in _FLOATS_OF_8:
        return values.view(np.uint8)
    return values


_FLOATS_OF_8 = ("float8_e4m3fn", "float8_e5m2")


def main_precision(sizes: Mapping[str, int]) -> str:
    """Return the precision of most weights, given how many numbers are of each type.

    >>> main_precision({"int8": 900, "float32": 100, "int64": 5000})
    'int8'
    """
    counts: Counter[str] = Counter()
    for dtype, count in sizes.items():
        if dtype in _PRECISIONS:
            counts[_PRECISIONS[dtype]] += count
    return counts.most_common(1)[0][0] if counts else "fp32"


def _port(port: Port) -> dict[str, Any]:
    shape = None if port.shape is None else list(port.shape)
    return {"name": port.name, "dtype": port.dtype, "shape": shape}
