"""The most this machine's matrix units give: large matmuls in fp32, bf16 and int8, all cores.

    python benchmarks/peak.py

Reads as the roof a model can reach: `encode.py` says which share of it the best variant gets.
Every number is the best of alternating rounds (a roof, so the noise of the machine is left out).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
from command_line import run_main
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from memopt.runtimes.cpu import BF16, cpu_features

# Large enough that the time between matmuls does not count.
SIZE = 2048


def onnx_session(kind: str) -> Callable[[], Any]:
    """Return a call that does one SIZE**3 matmul by onnxruntime, fp32 or u8 x s8 -> s32."""
    rng = np.random.default_rng(0)
    if kind == "int8":
        operator, input_type, weight_type = "MatMulInteger", TensorProto.UINT8, TensorProto.INT8
        output_type = TensorProto.INT32
        weight = rng.integers(-127, 127, (SIZE, SIZE)).astype(np.int8)
        value = rng.integers(0, 255, (SIZE, SIZE)).astype(np.uint8)
    else:
        operator, input_type, weight_type = "MatMul", TensorProto.FLOAT, TensorProto.FLOAT
        output_type = TensorProto.FLOAT
        weight = rng.standard_normal((SIZE, SIZE)).astype(np.float32)
        value = rng.standard_normal((SIZE, SIZE)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "peak",
        [helper.make_tensor_value_info("a", input_type, [SIZE, SIZE])],
        [helper.make_tensor_value_info("c", output_type, [SIZE, SIZE])],
        [helper.make_tensor("b", weight_type, weight.shape, weight.tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"a": value})


def openvino_request(kind: str) -> Callable[[], Any]:
    """Return a call that does one SIZE**3 matmul by OpenVINO in the precision `kind`."""
    import openvino as ov
    import openvino.opset13 as ops

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((SIZE, SIZE)).astype(np.float32)
    value = ops.parameter([SIZE, SIZE], np.float32)
    left: Any = value
    right: Any = ops.constant(weight)
    if kind == "int8":
        bounds = [ops.constant(np.float32(x)) for x in (0.0, 2.55)]
        left = ops.fake_quantize(ops.relu(value), *bounds, *bounds, 256)
        sides = [ops.constant(np.float32(x)) for x in (-4.0, 4.0)]
        right = ops.fake_quantize(right, *sides, *sides, 255)
    model = ov.Model([ops.matmul(left, right, False, True)], [value])
    hint = {"bf16": "bf16"}.get(kind, "f32")
    compiled = ov.Core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(rng.standard_normal((SIZE, SIZE)).astype(np.float32)))
    return request.infer


def peaks(rounds: int = 12) -> dict[str, float]:
    """Return the best matmul speed in GOP/s (2 per multiply-add) for each precision here.

    bf16 is left out where the processor has no instruction for it.
    """
    calls = {("fp32", "onnxruntime"): onnx_session("fp32")}
    calls["fp32", "openvino"] = openvino_request("fp32")
    if BF16 & cpu_features():
        calls["bf16", "openvino"] = openvino_request("bf16")
    calls["int8", "onnxruntime"] = onnx_session("int8")
    calls["int8", "openvino"] = openvino_request("int8")
    best: dict[str, float] = {}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for (kind, _runtime), call in calls.items():
            start = time.perf_counter()
            call()
            speed = 2 * SIZE**3 / (time.perf_counter() - start) / 1e9
            best[kind] = max(best.get(kind, 0.0), speed)
    return best


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = peaks()
    if options.json:
        print(json.dumps(found, indent=1))
        return
    table = Table(title=f"largest matmul speed here ({SIZE}x{SIZE}x{SIZE})")
    table.add_column("precision")
    table.add_column("GOP/s", justify="right")
    for kind, speed in found.items():
        table.add_row(kind, f"{speed:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    run_main(main)
