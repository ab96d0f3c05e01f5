"""The linear layers of a graph, matrix products with a constant weight: a finder a dialect."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.bundle import Bundle
from memopt.errors import WeightsError
from memopt.graphs.ir import constant, made_by
from memopt.graphs.openvino import constant_of, folded, nodes_of, value_name, varying
from memopt.weights.reader import WeightLoader

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One product ``source @ weight.T``.

    Attributes:
        name: the weight's, in the checkpoint where that is known.
        node: the product, in the runtime's own type.
        label: the node's name.
        source: the name of the activation that is multiplied.
        output: the name of the value that the node makes.
        shape: of the weight, (out, in).
        read: returns the weight.
    """

    name: str
    node: Any
    label: str
    source: str
    output: str
    shape: tuple[int, int]
    read: Callable[[], Array]

    @property
    def weight(self) -> Array:
        """The weight (out, in), float32; read from the graph each time, so that no copy is kept."""
        return self.read()

    @property
    def bias(self) -> Any:
        """The bias that an ONNX Gemm adds, None where another node does."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    @property
    def size(self) -> int:
        """Weights, which are the multiply-adds of one row."""
        return self.shape[0] * self.shape[1]


def onnx_linears(model: Any) -> list[Linear]:
    """Return the linear layers of an ``onnx_ir.Model``, in order.

    A weight behind a Transpose counts under its own name. Gemm counts when it is a plain product:
    alpha and beta 1, left side not transposed.
    """
    layers = [_onnx_linear(node) for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    return [item for item in layers if item is not None]


def _onnx_linear(node: Any) -> Linear | None:
    value = node.inputs[1]
    transpose = made_by(value, "Transpose")
    flipped = transpose is not None and transpose.inputs[0].is_initializer()
    if transpose is not None and flipped:
        value = transpose.inputs[0]
    if node.op_type == "Gemm":
        given = node.attributes
        plain = all(given[key].as_float() == 1 for key in ("alpha", "beta") if key in given)
        if not plain or ("transA" in given and given["transA"].as_int()):
            return None
        flipped ^= bool("transB" in given and given["transB"].as_int())
    if not value.is_initializer() or len(value.shape) != 2 or value.dtype.name != "FLOAT":
        return None

    def read() -> Array:
        array = constant(value)
        assert array is not None
        return np.ascontiguousarray(array if flipped else array.T)

    rows, columns = (int(side) for side in value.shape)
    return Linear(
        name=value.name,
        node=node,
        label=node.name,
        source=node.inputs[0].name,
        output=node.outputs[0].name,
        shape=(rows, columns) if flipped else (columns, rows),
        read=read,
    )


def openvino_linears(model: Any, name_of: Callable[[Array], str | None]) -> list[Linear]:
    """Return the linear layers of an ``openvino.Model``, in order.

    A layer is named after its weight in the checkpoint where ``name_of`` knows it, else after its
    node. A product of learned queries, the same for every input, is none: the plugin computes it
    once, and cannot where it is in integers (OpenVINO 2026.4).
    """
    inner = varying(model)
    products = [
        n for n in nodes_of(model, "MatMul") if n.input_value(0).get_node().get_name() in inner
    ]
    layers = [_openvino_linear(node, name_of) for node in products]
    return [item for item in layers if item is not None]


def _openvino_linear(node: Any, name_of: Callable[[Array], str | None]) -> Linear | None:
    stored = constant_of(node.input_value(1))
    # What is transposed on its way in has its features on another axis than the last.
    turned = node.get_attributes()["transpose_a"]
    if stored is None or turned or len(stored.get_output_shape(0)) != 2:
        return None

    def read() -> Array:
        weight = folded(node.input_value(1))
        return np.ascontiguousarray(
            weight if node.get_attributes()["transpose_b"] else weight.T, np.float32
        )

    weight, label = read(), node.get_friendly_name()
    rows, columns = weight.shape
    return Linear(
        name=name_of(weight) or label,
        node=node,
        label=label,
        source=value_name(node.input_value(0)),
        output=f"{label}:0",
        shape=(rows, columns),
        read=read,
    )


def weight_names(bundle: Bundle) -> Callable[[Any], str | None]:
    """Return a function from a weight matrix, either way up, to its name in the checkpoint.

    Converters rename constants; the values say which weight one is. OpenVINO graphs come without
    checkpoint names for transposed weights.
    """
    names: dict[bytes, str] = {}
    try:
        with WeightLoader(bundle.weights) as loader:
            for name in loader.names():
                weight = loader.load(name)
                if weight.ndim == 2:
                    names.setdefault(_fingerprint(np.asarray(weight, np.float32)), name)
    except (WeightsError, FileNotFoundError):
        # Without the weight file layers are called by their graph nodes.
        return lambda _: None
    return lambda weight: names.get(_fingerprint(weight))


def _fingerprint(weight: Any) -> bytes:
    """Hash a matrix by what its transpose has too: sides, diagonal, largest magnitude."""
    side = min(weight.shape)
    state = hashlib.sha256(repr((*sorted(weight.shape), float(np.abs(weight).max()))).encode())
    state.update(np.ascontiguousarray(np.diag(weight[:side, :side]), np.float32).tobytes())
    return state.digest()
