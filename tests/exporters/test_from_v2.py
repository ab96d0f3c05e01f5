"""V2 weights into a graph: exactly the file's integers, and the dequantized weights' answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from memopt.bundle import Bundle, open_bundle
from memopt.errors import ExportError, WeightsError
from memopt.exporters.from_v2 import export_v2, quantized_graph
from memopt.weights.packing import RANGES, unpack
from memopt.weights.quantized import QuantizedWeight, scale_shape
from memopt.weights.reader import WeightLoader
from memopt.weights.writer import write_quantized, write_weights

SHAPES = {"table.weight": (20, 64), "first.weight": (64, 64), "second.weight": (24, 64)}
BIAS = np.linspace(-1, 1, 64, dtype=np.float32)


def files(
    folder: Path, bits: int, axis: int, group: int, symmetric: bool, minima: bool = False
) -> tuple[Path, ...]:
    """A V2 file with any integers in its range, and a float graph and V1 file it could be of."""
    rng = np.random.default_rng(0)
    low, high = RANGES[bits]
    floats = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    floats["first.bias"] = BIAS
    made: dict[str, QuantizedWeight | np.ndarray] = {"first.bias": BIAS}
    for name, shape in SHAPES.items():
        places = scale_shape(shape, axis, group)
        points = rng.integers(low, high + 1, places, np.int8).reshape(places)
        made[name] = QuantizedWeight(
            rng.integers(low, high + 1, shape, np.int8),
            rng.uniform(0.01, 0.1, places).astype(np.float32).reshape(places),
            np.zeros(0, np.int8) if symmetric else points,
            axis,
            group,
            bits,
            rng.standard_normal(places if minima else 0).astype(np.float32),
        )
    write_weights(folder / "v1.parquet", floats)
    write_quantized(folder / "v2.parquet", made.items(), minima=minima)
    nodes = [
        helper.make_node("Gather", ["table.weight", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "first.weight"], ["product"]),
        helper.make_node("Add", ["product", "first.bias"], ["hidden"]),
        helper.make_node("Gemm", ["hidden", "second.weight"], ["out"], transB=1),
    ]
    arrays = {**floats, "first.weight": np.ascontiguousarray(floats["first.weight"].T)}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("ids", 7, ["n"])],
        [helper.make_tensor_value_info("out", 1, ["n", 24])],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "float.onnx")
    return folder / "float.onnx", folder / "v1.parquet", folder / "v2.parquet"


def integers(model: Any, name: str, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Read the stored integers of a weight back out of the graph, in the graph's layout."""
    names = (f"{name}_quantized", f"{name}_packed")
    item = next(i for i in model.graph.initializer if i.name in names)
    if item.data_type == onnx.TensorProto.UINT8:  # rows of blocks, offset by half the range
        raw = numpy_helper.to_array(item).reshape(-1).view(np.int8)
        count = raw.size * 8 // bits
        unsigned = unpack(raw, count, bits).view(np.uint8) & ((1 << bits) - 1)
        values = (unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
        rows = item.dims[0]
        width = shape[0] if rows == shape[1] and len(item.dims) == 3 else shape[-1]
        return values.reshape(rows, -1)[:, :width]
    return numpy_helper.to_array(item).astype(np.int8)


def run(model: Any, ids: np.ndarray) -> np.ndarray:
    """Run a model in ONNX Runtime as it is written, without its int8-activation fusion."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = ort.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, {"ids": ids})[0])


@pytest.mark.parametrize("minima", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "axis", "group"),
    [
        *((8, 0, 0), (8, -1, 0), (8, 1, 0), (8, 1, 16), (8, 1, 24), (8, 1, 32)),
        *((4, 0, 0), (4, -1, 0), (4, 1, 0), (4, 1, 16), (4, 1, 24), (4, 1, 48)),
        *((2, 0, 0), (2, -1, 0), (2, 1, 24), (2, 1, 32)),
    ],
)
def test_the_graph_holds_the_files_integers(
    tmp_path: Path, bits: int, axis: int, group: int, symmetric: bool, minima: bool
) -> None:
    """Every integer is the file's, and the answers are those of the dequantized weights."""
    if minima and group and 64 % group:
        return  # groups with minima are whole: GGUF has no others
    graph, v1, v2 = files(tmp_path, bits, axis, group, symmetric, minima)
    model, _ = quantized_graph(graph, v1, v2)
    onnx.checker.check_model(model)
    assert not {i.name for i in model.graph.initializer} & set(SHAPES)
    ids = np.array([3, 0, 19, 7])
    with WeightLoader(v2) as loader:
        for name, shape in SHAPES.items():
            stored = loader.load_quantized(name).integers
            found = integers(model, name, bits, shape)
            # Linear weights stand transposed in the float graph; MatMulNBits wants rows of inputs.
            turned = name == "first.weight" and not np.array_equal(found, stored)
            assert np.array_equal(found.T if turned else found, stored)
        table, first, second = (loader.load(n).astype(np.float64) for n in SHAPES)
        bias = loader.load("first.bias").astype(np.float64)
    expected = (table[ids] @ first.T + bias) @ second.T
    assert np.abs(run(model, ids) - expected).max() <= 2e-5 * np.abs(expected).max()


def test_a_vector_keeps_the_axes_that_the_graph_gave_it(tmp_path: Path) -> None:
    """DeBERTa's biases of queries stand as (1, heads, 1, dimension) in its graph."""
    graph, v1, v2 = files(tmp_path, 8, 0, 0, True)
    plain, _ = quantized_graph(graph, v1, v2)
    model = onnx.load(graph)
    bias = next(i for i in model.graph.initializer if i.name == "first.bias")
    bias.CopyFrom(numpy_helper.from_array(BIAS.reshape(1, -1), bias.name))
    onnx.save(model, graph)
    laid_out, _ = quantized_graph(graph, v1, v2)
    ids = np.array([3, 0, 19, 7])
    assert np.array_equal(run(laid_out, ids), run(plain, ids))
    bias.CopyFrom(numpy_helper.from_array(BIAS[::-1].reshape(1, -1), bias.name))
    onnx.save(model, graph)
    with pytest.raises(WeightsError, match="is not the weight file's"):
        quantized_graph(graph, v1, v2)


def test_kernels_that_fit_are_used(tmp_path: Path) -> None:
    """Groups of a power of two run packed; other layouts are dequantized."""
    graph, v1, v2 = files(tmp_path, 4, 1, 32, True)
    assert quantized_graph(graph, v1, v2)[1] == {
        "MatMulNBits": 1,
        "GatherBlockQuantized": 1,
        "DequantizeLinear": 1,
    }
    graph, v1, v2 = files(tmp_path, 4, 1, 24, True)
    assert quantized_graph(graph, v1, v2)[1] == {"DequantizeLinear": 3}


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """A V2 file with other names, or a graph with other values, names the weight."""
    graph, v1, v2 = files(tmp_path, 8, 0, 0, True)
    write_quantized(v2, [("other.weight", np.ones((2, 2), np.float32))])
    with pytest.raises(ExportError, match=r"'other\.weight'"):
        quantized_graph(graph, v1, v2)
    write_quantized(v2, [("first.bias", BIAS)])
    with pytest.raises(ExportError, match="no quantized weight"):
        quantized_graph(graph, v1, v2)
    write_weights(v1, {"first.bias": BIAS + 1})
    with pytest.raises(WeightsError, match=r"'first\.bias'"):
        quantized_graph(graph, v1, v2)


@pytest.mark.slow
def test_minilm_int4_runs_with_the_files_integers(minilm_copy: Bundle) -> None:
    """The real model: checked against torch with the dequantized weights, and recorded."""
    path = minilm_copy.path / "weights_int4.parquet"

    def quantized() -> Any:
        with WeightLoader(minilm_copy.weights) as loader:
            for name, weight in loader.items():
                if weight.ndim != 2 or weight.dtype.kind != "f":
                    yield name, weight
                    continue
                scales = np.abs(weight).reshape(len(weight), -1, 32).max(-1) / 7
                steps = np.rint(weight / np.repeat(scales, 32, 1)) if scales.all() else weight * 0
                yield (
                    name,
                    QuantizedWeight(steps.astype(np.int8), scales, np.zeros(0, np.int8), 1, 32, 4),
                )

    write_quantized(path, quantized())
    variant = export_v2(open_bundle(minilm_copy.path), "weights_int4.parquet")
    assert variant.name == "onnx-int4-arrow"
    assert variant.check is not None
    assert variant.check["min_cosine"] > 0.9999999
    bundle = open_bundle(minilm_copy.path)
    assert bundle.variant("onnx-int4-arrow") == variant
    assert bundle.verify() == []
    # Nothing has measured these integers' quality: the engine does not pick them by itself.
    assert not variant.passed
    model = onnx.load(bundle.file(variant))
    name = "encoder.layer.2.intermediate.dense.weight"
    with WeightLoader(path) as loader:
        assert np.array_equal(
            integers(model, name, 4, (384, 1536)), loader.load_quantized(name).integers
        )
    size = bundle.file(variant).stat().st_size
    assert size < 0.17 * bundle.weights.stat().st_size
