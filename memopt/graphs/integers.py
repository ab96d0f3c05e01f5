"""What really ran: the share of a graph's work that its runtime does in integers."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memopt.graphs.openvino import read_openvino
from memopt.graphs.session import THREADS, Feed
from memopt.runtimes.onnx import cpu_session, session_options
from memopt.runtimes.openvino_core import compile_known, open_core

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


def integer_share(
    path: Path, format: str, feed: Feed, options: Mapping[str, str]
) -> dict[str, Any]:
    """Return the share of a graph's work on one input that runs in integers.

    Returns:
        ``int8_macs`` in [0, 1]: multiply-accumulates of the int8 kernels over all, and ``kernels``:
        how often each multiplying kernel ran.
    """
    if format == "openvino":
        return _openvino_share(path, feed, options)
    return _onnx_share(path, feed)


def _record(integer: int, whole: int, kernels: Counter[str]) -> dict[str, Any]:
    share = integer / whole if whole else 0.0
    return {"int8_macs": share, "kernels": dict(sorted(kernels.items()))}


def _onnx_share(path: Path, feed: Feed) -> dict[str, Any]:
    """Run a graph once under ONNX Runtime's profiler.

    What is read is the optimized graph as it executed, shapes included, not the file.
    """
    with tempfile.TemporaryDirectory(prefix="memopt-profile-") as folder:
        options = session_options(THREADS)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        session = cpu_session(path, options)
        inputs = {item.name for item in session.get_inputs()}
        session.run(None, {name: value for name, value in feed.items() if name in inputs})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    macs: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in events:
        args = event.get("args", {})
        name = args.get("op_name")
        if name in INTEGER_OPS | FLOAT_OPS and "output_type_shape" in args:
            kernels[name] += 1
            product, scores = _kernel_macs(name, args)
            macs[name] += product
            macs["scores"] += scores
    whole = sum(macs.values())
    integer = sum(count for name, count in macs.items() if name in INTEGER_OPS)
    return _record(integer, whole, kernels)


def _kernel_macs(name: str, args: Mapping[str, Any]) -> tuple[int, int]:
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


def _openvino_share(path: Path, feed: Feed, options: Mapping[str, str]) -> dict[str, Any]:
    """Compile a graph for one input shape and read the kernels of the compiled graph."""
    model = read_openvino(path)
    shapes = {
        port: list(feed[name].shape)
        for port in model.inputs
        for name in port.get_names()
        if name in feed
    }
    model.reshape(shapes)
    whole = sum(_node_macs(node) for node in model.get_ordered_ops())
    compiled = compile_known(open_core(), model, "CPU", options)
    kernels: Counter[str] = Counter()
    integer = 0
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        kind, kernel = info.get("layerType", ""), info.get("primitiveType", "")
        if not kind.startswith(("FullyConnected", "MatMul", "Convolution")):
            continue
        if node.output(0).get_partial_shape().is_dynamic:
            continue
        kernels[f"{kind} {kernel}"] += 1
        if kernel.lower().endswith(("_i8", "_u8")):
            integer += _executed_macs(kind, node)
    return _record(integer, whole, kernels)


def _executed_macs(kind: str, node: Any) -> int:
    """Return the multiply-accumulates of a node of a compiled graph."""
    output = int(np.prod(list(node.output(0).get_shape())))
    left, right = (list(node.input(place).get_shape()) for place in (0, 1))
    return output * int(np.prod(right[1:])) if kind.startswith("Conv") else output * int(left[-1])


def _node_macs(node: Any) -> int:
    """Return the multiply-accumulates of a node of static shape."""
    kind = node.get_type_name()
    if kind not in ("MatMul", "Convolution", "GroupConvolution", "ScaledDotProductAttention"):
        return 0
    if node.output(0).get_partial_shape().is_dynamic:
        return 0  # pooling of as many texts as the mask counts: too little to matter
    output = int(np.prod(list(node.output(0).get_shape())))
    left, right = (list(node.input(place).get_shape()) for place in (0, 1))
    if kind == "MatMul":
        return output * int(left[-2] if node.get_attributes()["transpose_a"] else left[-1])
    if kind == "ScaledDotProductAttention":
        return 2 * output * int(right[-2])
    kernel = right[2:] if kind == "GroupConvolution" else right[1:]
    return output * int(np.prod(kernel))
