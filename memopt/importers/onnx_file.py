"""ONNX files of others: what is in them, and whether they are whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import ExportError, first_line
from memopt.extras import require
from memopt.files import stays_below
from memopt.importers.graph_file import FEWEST_VALUES, GraphFile, main_precision
from memopt.runtimes.engines.graph import Port

# Domains whose operators ONNX Runtime has without a library of somebody's.
_OURS = ("", "ai.onnx", "ai.onnx.ml")
_MICROSOFT = "com.microsoft"
_INTEGER = {
    *("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul"),
    *("MatMulIntegerToFloat", "DynamicQuantizeLSTM"),
}
_Q_OPERATOR = {"QGemm", "QAttention", "QEmbedLayerNormalization"}
# Between the token ids and the table they are looked up in.
_PASSES = {"Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Clip", "Pad"}
# Between a table of integers and the numbers it stands for.
_UNPACKS = {"DequantizeLinear", "Cast", "Mul", "Sub", "Identity", "Transpose"}
_NO_ONNX = "give a file that starts as onnx.save writes it"


def read_onnx_file(path: Path) -> GraphFile:
    """Read an ONNX file without its weights' values.

    Raises:
        ExportError: as of :func:`memopt.importers.dialects.read_graph`.
    """
    model = _load(path)
    local = {function.domain for function in model.functions}
    operators: Counter[tuple[str, str]] = Counter()
    for node in _nodes(model):
        operators[node.domain, node.op_type] += 1
    foreign = [
        (domain, op)
        for domain, op in operators
        if domain not in (*_OURS, *local) and not domain.startswith(_MICROSOFT)
    ]
    if foreign:
        domain, op = foreign[0]
        raise ExportError(
            f"{path} uses the operator {op} of the domain {domain!r}, which is none of ONNX's or "
            "ONNX Runtime's own",
            fix="memopt loads no libraries of operators: export the model without it",
        )
    sizes: Counter[str] = Counter()
    for _, tensor in _tensors(model):
        sizes[_dtype_name(tensor.data_type)] += int(np.prod(tensor.dims))
    narrow = _narrow_bits(model)
    precision = f"int{narrow}" if narrow else main_precision(sizes)
    names = {op for _, op in operators}
    taken = {tensor.name for tensor in model.graph.initializer}
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    return GraphFile(
        path=path,
        format="onnx",
        inputs=tuple(_port(value) for value in model.graph.input if value.name not in taken),
        outputs=tuple(_port(value) for value in model.graph.output),
        precision=precision,
        quantization=_quantization(names, precision),
        version=model.ir_version,
        opset=opset,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        beside=_beside(model, path),
        fused=any(domain.startswith(_MICROSOFT) for domain, _ in operators),
        rows=_rows(model),
    )


def constants(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and values of each weight: initializers, and constants of some size."""
    from onnx import numpy_helper

    model = _load(path)
    for name, tensor in _tensors(model):
        if _dtype_name(tensor.data_type) != "str":
            yield name, np.asarray(numpy_helper.to_array(tensor, str(path.parent)))


def _load(path: Path) -> Any:
    onnx = require("onnx", extra="export", why="read ONNX files")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ExportError(
            f"{path} is not an ONNX file ({first_line(error)[:100]})", fix=_NO_ONNX
        ) from error
    # Any bytes may happen to be a message of fields that nobody knows.
    if not model.graph.node or not model.opset_import or not model.graph.output:
        raise ExportError(f"{path} is not an ONNX file: it has no graph", fix=_NO_ONNX)
    return model


def _nodes(model: Any) -> Iterator[Any]:
    stack = [*model.graph.node, *(n for function in model.functions for n in function.node)]
    while stack:
        node = stack.pop()
        yield node
        for _, graph in _subgraphs(node):
            stack += graph.node


def _subgraphs(node: Any) -> Iterator[tuple[str, Any]]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for number, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}{number}", graph


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield each initializer, and each constant that is no shape, the inner graphs' as well."""

    def walk(graph: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for tensor in graph.initializer:
            yield prefix + tensor.name, tensor
        for number, node in enumerate(graph.node):
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.HasField("t") and np.prod(attribute.t.dims) >= FEWEST_VALUES:
                        yield prefix + node.output[0], attribute.t
            for name, inner in _subgraphs(node):
                yield from walk(inner, f"{prefix}{node.name or f'{node.op_type}_{number}'}.{name}.")

    yield from walk(model.graph, "")


def _port(value: Any) -> Port:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        raise ExportError(
            f"{value.name} of the graph is no tensor but {value.type.WhichOneof('value')}",
            fix="export the model with tensors in and out",
        )
    if not kind.HasField("shape"):
        return Port(value.name, _dtype_name(kind.elem_type), None)
    sizes = tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param or f"axis{axis}"
        for axis, d in enumerate(kind.shape.dim)
    )
    return Port(value.name, _dtype_name(kind.elem_type), sizes)


def _dtype_name(number: int) -> str:
    import onnx

    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(number)
    except (KeyError, TypeError):
        return "unknown"
    return "str" if dtype == np.dtype(object) or dtype.kind in "SU" else dtype.name


def _beside(model: Any, path: Path) -> tuple[str, ...]:
    """Return the files of the weights that lie beside the graph, checked.

    Raises:
        ExportError: one is missing, too short, or outside the graph's folder.
    """
    import onnx

    files: dict[str, int] = {}
    for name, tensor in _every_tensor(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        stated = {entry.key: entry.value for entry in tensor.external_data}
        where = stated.get("location", "")
        if not stays_below(where):
            raise ExportError(
                f"{path}: the values of {name!r} lie in {where!r}, which is not below its folder",
                fix="save the graph anew with its data beside it",
            )
        end = int(stated.get("offset", 0)) + int(stated.get("length", 0))
        files[where] = max(files.get(where, 0), end)
    for where, end in files.items():
        file = path.parent / where
        if not file.is_file():
            raise ExportError(
                f"{file} is missing: {path.name} has its weights there",
                fix="copy it beside the graph",
            )
        if file.stat().st_size < end:
            raise ExportError(
                f"{file} has {file.stat().st_size} bytes, {path.name} reads {end}",
                fix="copy it again",
            )
    return tuple(files)


def _every_tensor(model: Any) -> Iterator[tuple[str, Any]]:
    yield from ((tensor.name, tensor) for tensor in model.graph.initializer)
    for node in _nodes(model):
        for attribute in node.attribute:
            tensors = [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]
            yield from ((node.name or node.op_type, tensor) for tensor in tensors)
        for _, graph in _subgraphs(node):
            yield from ((tensor.name, tensor) for tensor in graph.initializer)


def _narrow_bits(model: Any) -> int | None:
    """Return the bits of weights that are packed into bytes by MatMulNBits."""
    found = (
        attribute.i
        for node in _nodes(model)
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "bits"
    )
    return next(found, None)


def _quantization(operators: set[str], precision: str) -> str:
    """Return how a graph's integers are used.

    >>> _quantization({"QuantizeLinear", "DequantizeLinear", "MatMul"}, "int8")
    'QDQ'
    >>> _quantization({"MatMul"}, "fp32")
    ''
    """
    if operators & _Q_OPERATOR or any(name.startswith("QLinear") for name in operators):
        return "QOperator"
    if operators & _INTEGER:
        return "MatMulInteger"
    if "QuantizeLinear" in operators:
        return "QDQ"
    if "MatMulNBits" in operators:
        return "MatMulNBits"
    if precision not in ("int8", "int4", "int2"):
        return ""
    return "weights only" if "DequantizeLinear" in operators else "integers cast to float"


def _rows(model: Any) -> int | None:
    """Return the rows of the table that an input of token ids is looked up in, if one is seen."""
    made = {output: node for node in model.graph.node for output in node.output}
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    shapes[node.output[0]] = list(attribute.t.dims)
    tokens = [value.name for value in model.graph.input if value.name in _TOKENS]
    found = []
    for node in model.graph.node:
        if node.op_type != "Gather" or _origin(node.input[1], made, _PASSES) not in tokens:
            continue
        shape = shapes.get(_origin(node.input[0], made, _UNPACKS), [])
        if len(shape) == 2:
            found.append(shape[0])
    return min(found, default=None)


_TOKENS = ("input_ids", "input_word_ids", "tokens", "token_ids", "ids")


def _origin(name: str, made: dict[str, Any], passes: set[str]) -> str:
    while name in made and made[name].op_type in passes:
        name = made[name].input[0]
    return name
