"""Reading and changing ONNX graphs for quantization: weighted products, tables, what really ran."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.extras import require
from memopt.quantization.graph_runner import THREADS

if TYPE_CHECKING:
    from memopt.quantization.statistics import Array, Feed, Observe

# Operators of ONNX Runtime whose product runs on integers.
INTEGER_OPS = frozenset(
    {"MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm", "QAttention"}
    | {"DynamicQuantizeMatMul", "QLinearConv", "ConvInteger"}
)
# MatMulNBits multiplies in int8 only where accuracy_level 4 asks for it: counted apart.
FLOAT_OPS = frozenset(
    {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Attention", "MultiHeadAttention", "Conv"}
    | {"FusedConv", "MatMulNBits"}
)
# Tables below this many bytes stay float: token types are not worth a second Gather.
SMALLEST_TABLE = 1 << 18


@dataclass(frozen=True, slots=True)
class Linear:
    """A MatMul or Gemm with a constant weight; ``weight`` is (out, in)."""

    name: str
    node: Any
    weight: Array

    @property
    def source(self) -> str:
        """The activation it multiplies."""
        return str(self.node.input[0])


def read_onnx(path: Path) -> Any:
    """Return the ``onnx.ModelProto`` of a file, weights included, every node named."""
    onnx = require("onnx", extra="export", why="quantize ONNX graphs")
    model = onnx.load(str(path))
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return model


def initializers(model: Any) -> dict[str, Any]:
    """Return name -> TensorProto."""
    return {item.name: item for item in model.graph.initializer}


def find_linears(model: Any) -> list[Linear]:
    """Return the products of a graph whose right side is a constant float matrix, in order.

    A weight behind a Transpose counts under its own name. Gemm counts when it is a plain product:
    alpha and beta 1, left side not transposed.
    """
    from onnx import numpy_helper

    constants = initializers(model)
    turned = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] in constants
    }
    found = []
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        name = turned.get(node.input[1], node.input[1])
        flipped = name != node.input[1]
        if node.op_type == "Gemm":
            values = {item.name: item for item in node.attribute}
            plain = all(values[k].f == 1 for k in ("alpha", "beta") if k in values)
            if not plain or ("transA" in values and values["transA"].i):
                continue
            flipped ^= bool("transB" in values and values["transB"].i)
        if name not in constants or len(constants[name].dims) != 2:
            continue
        array = numpy_helper.to_array(constants[name])
        if array.dtype != np.float32:
            continue
        found.append(Linear(name, node, np.ascontiguousarray(array if flipped else array.T)))
    return found


def find_tables(model: Any) -> list[tuple[str, Any]]:
    """Return (name, Gather node) of every large float embedding table used by one Gather only."""
    constants = initializers(model)
    uses = Counter(name for node in model.graph.node for name in node.input)
    found = []
    for node in model.graph.node:
        if node.op_type != "Gather" or node.input[0] not in constants:
            continue
        table = constants[node.input[0]]
        axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
        big = len(table.dims) == 2 and table.dims[0] * table.dims[1] * 4 >= SMALLEST_TABLE
        if big and axis == 0 and table.data_type == 1 and uses[table.name] == 1:
            found.append((table.name, node))
    return found


def quantize_tables(model: Any, kept: frozenset[str] | set[str]) -> list[tuple[str, float]]:
    """Turn large embedding tables into int8 rows with a scale each; return (name, error).

    Scales are float16 where all of them are normal numbers there, else float32.
    """
    from onnx import helper, numpy_helper

    from memopt.quantization.static import round_table

    constants = initializers(model)
    done = []
    for name, node in find_tables(model):
        if name in kept:
            continue
        values = numpy_helper.to_array(constants[name])
        integers, scales = round_table(values)
        ids, output = node.input[1], node.output[0]
        half = scales.astype(np.float16)
        if (np.abs(half) >= np.finfo(np.float16).smallest_normal).all() and np.isfinite(half).all():
            # A scale a row in float32 would be half a percent of a small model's file.
            scales = half
            wide = half.astype(np.float32)
            integers = np.clip(np.rint(values / wide), -127, 127).astype(np.int8)
        add_initializers(model, {f"{name}_quantized": integers, f"{name}_scale": scales})
        parts = [
            helper.make_node("Gather", [f"{name}_quantized", ids], [f"{output}_int8"]),
            helper.make_node("Cast", [f"{output}_int8"], [f"{output}_steps"], to=1),
            helper.make_node("Gather", [f"{name}_scale", ids], [f"{output}_stored"]),
            helper.make_node("Cast", [f"{output}_stored"], [f"{output}_scale"], to=1),
            helper.make_node("Mul", [f"{output}_steps", f"{output}_scale"], [output]),
        ]
        replace_node(model, node, [named(part, part.output[0]) for part in parts])
        drop_unused(model)
        error = ((integers * scales.astype(np.float32) - values) ** 2).sum() / max(
            float((values**2).sum()), 1e-12
        )
        done.append((name, float(error)))
    return done


def add_initializers(model: Any, arrays: Mapping[str, Any]) -> None:
    """Append constants; a name that is there already is left as it is."""
    from onnx import numpy_helper

    have = set(initializers(model))
    for name, array in arrays.items():
        if name not in have:
            contiguous = np.ascontiguousarray(array).reshape(np.shape(array))
            model.graph.initializer.append(numpy_helper.from_array(contiguous, name))


def replace_node(model: Any, old: Any, new: Sequence[Any]) -> None:
    """Put nodes in the place of one, so that the order stays topological."""
    nodes = list(model.graph.node)
    place = next(i for i, node in enumerate(nodes) if node.name == old.name)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *new, *nodes[place + 1 :]])


def drop_unused(model: Any) -> None:
    """Remove constants, and Transposes of constants, that nothing reads any more."""
    outputs = {item.name for item in model.graph.output}
    while True:
        used = {name for node in model.graph.node for name in node.input} | outputs
        idle = [n for n in model.graph.node if not any(name in used for name in n.output)]
        for node in idle:
            model.graph.node.remove(node)
        if not idle:
            break
    for item in [item for item in model.graph.initializer if item.name not in used]:
        model.graph.initializer.remove(item)


def add_domain(model: Any, domain: str, version: int = 1) -> None:
    """Declare an operator set unless the model has it."""
    from onnx import helper

    if domain not in {item.domain for item in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(domain, version))


def observer(model: Any, names: Sequence[str]) -> Observe:
    """Return a function that runs the graph and returns the values called ``names``."""
    import copy

    onnx = require("onnx", extra="export", why="quantize ONNX graphs")
    ort = require("onnxruntime", extra="cpu", why="calibrate an ONNX graph")
    watched = copy.deepcopy(model)
    have = {item.name for item in watched.graph.output}
    for name in names:
        if name not in have:
            watched.graph.output.append(onnx.ValueInfoProto(name=name))
    session = ort.InferenceSession(
        watched.SerializeToString(), _options(), providers=["CPUExecutionProvider"]
    )
    wanted = {item.name for item in session.get_inputs()}

    def run(feed: Feed) -> Sequence[Any]:
        given = {key: value for key, value in feed.items() if key in wanted}
        return list(session.run(list(names), given))

    return run


def integer_share(path: Path, feed: Feed) -> dict[str, Any]:
    """Run a graph once under ONNX Runtime's profiler; return the share of its work in integers.

    Returns:
        ``int8_macs`` in [0, 1]: multiply-accumulates of the kernels that ran in int8 over all, and
        ``kernels``: how often each multiplying operator ran. Read from the optimized graph as it
        executed, shapes included, not from the file.
    """
    ort = require("onnxruntime", extra="cpu", why="profile an ONNX graph")
    with tempfile.TemporaryDirectory(prefix="memopt-profile-") as folder:
        options = _options()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        wanted = {item.name for item in session.get_inputs()}
        session.run(None, {key: value for key, value in feed.items() if key in wanted})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    macs: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in events:
        args = event.get("args", {})
        name = args.get("op_name")
        if name in INTEGER_OPS | FLOAT_OPS and "output_type_shape" in args:
            kernels[name] += 1
            product, scores = _macs(name, args)
            macs[name] += product
            macs["scores"] += scores
    whole = sum(macs.values())
    integer = sum(count for name, count in macs.items() if name in INTEGER_OPS)
    return {
        "int8_macs": integer / whole if whole else 0.0,
        "kernels": dict(sorted(kernels.items())),
    }


def _macs(name: str, args: Mapping[str, Any]) -> tuple[int, int]:
    """Return the multiply-accumulates of one executed kernel from its shapes.

    The second number is attention's scores and their product with the values, which are float in
    every kernel.
    """
    inputs = [next(iter(item.values())) for item in args["input_type_shape"]]
    output = next(iter(args["output_type_shape"][0].values()))
    if name in ("Attention", "QAttention", "MultiHeadAttention"):
        batch, length, width = inputs[0][:3]
        # The packed weight has no shape here: query, key and value are each as wide as the output.
        projections = 0 if name == "MultiHeadAttention" else batch * length * width * 3 * output[-1]
        return int(projections), int(2 * batch * length * length * output[-1])
    if "Conv" in name:
        kernel = next(shape for shape in inputs[1:] if len(shape) == len(inputs[0]))
        return int(np.prod(output) * np.prod(kernel[1:])), 0
    return int(np.prod(output) * inputs[0][-1]), 0


def named(node: Any, name: str) -> Any:
    """Give a new node its name and return it."""
    node.name = f"quantized/{name}"
    return node


def _options() -> Any:
    from memopt.runtimes.onnx import session_options

    return session_options(THREADS)
