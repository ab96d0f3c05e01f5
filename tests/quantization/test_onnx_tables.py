"""Embedding tables in ONNX graphs: int8 rows, scales as narrow as they may be."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from memopt.graphs.ir import from_proto, to_proto
from memopt.quantization.methods.tables import SMALLEST_TABLE, quantize_tables


def embedding(table: np.ndarray) -> object:
    """A model that looks rows up."""
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["rows"], name="lookup")],
        "tables",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", table.shape[1]])],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    return model


@pytest.mark.parametrize(
    ("size", "stored"), [(1.0, TensorProto.FLOAT16), (1e-7, TensorProto.FLOAT)]
)
def test_a_table_keeps_its_rows_within_half_a_step(size: float, stored: int) -> None:
    """float16 scales where they are exact enough, float32 for a table of tiny values."""
    rng = np.random.default_rng(0)
    table = (rng.normal(size=(SMALLEST_TABLE // 4 // 64 + 1, 64)) * size).astype(np.float32)
    graph = from_proto(embedding(table))
    (layer,) = quantize_tables(graph, set())
    assert layer.name == "table"
    assert layer.error is not None
    assert 0 < layer.error < 1e-4
    model = to_proto(graph)
    scale = next(i for i in model.graph.initializer if i.name == "table_scale")
    assert scale.data_type == stored
    session = ort.InferenceSession(
        model.SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    ids = np.arange(len(table))
    (rows,) = session.run(None, {"ids": ids})
    steps = numpy_helper.to_array(scale).astype(np.float32)
    # A scale that was rounded down may leave the largest value of a row a little over 127 steps.
    assert (np.abs(rows - table) <= steps * 0.57).all()
