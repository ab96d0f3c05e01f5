"""Looking inside graphs, and packing weights for the kernels that read them packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from memopt.graphs.blocks import to_blocks
from memopt.graphs.observe import observer, present
from memopt.weights.packing import unpack
from memopt.weights.quantized import QuantizedWeight

WEIGHT = np.arange(16, dtype=np.float32).reshape(4, 4)
FEED = {"x": np.ones((3, 4), np.float32)}


def model(folder: Path, **options: object) -> Path:
    """x @ w, doubled."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        helper.make_node("Add", ["y", "y"], ["z"], name="double"),
    ]
    x, z = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in "xz")
    graph = helper.make_graph(nodes, "g", [x], [z], [numpy_helper.from_array(WEIGHT, "w")])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(made, folder / "model.onnx", **options)
    return folder / "model.onnx"


@pytest.mark.parametrize("beside", [False, True])
def test_inner_values_and_outputs_are_seen(tmp_path: Path, beside: bool) -> None:
    """In the order asked for, weights inside the file or beside it, and no file is left."""
    options = {"save_as_external_data": True, "location": "w.data", "size_threshold": 0}
    file = model(tmp_path, **(options if beside else {}))
    before = sorted(tmp_path.iterdir())
    z, y = observer(file, "onnx", ["z", "y"])(FEED)
    assert np.array_equal(y, FEED["x"] @ WEIGHT)
    assert np.array_equal(z, 2 * y)
    assert sorted(tmp_path.iterdir()) == before
    assert present(file, "onnx", ["y", "w", "q", "z"]) == ["y", "z"]


def test_a_value_that_is_an_output_already_is_seen_in_openvino(tmp_path: Path) -> None:
    """A language model's last product is its output too."""
    import openvino as ov

    file = tmp_path / "model.xml"
    ov.save_model(ov.convert_model(model(tmp_path)), file, compress_to_fp16=False)
    names = present(file, "openvino", ["z:0", "y:0", "product:0", "double:0"])
    assert len(names) == 2
    values = observer(file, "openvino", names)(FEED)
    assert sorted(float(v.sum()) for v in values) == [360.0, 720.0]


def test_what_fills_a_block_is_its_zero_point() -> None:
    """The end of a row that does not fill its block adds nothing to a product."""
    integers = np.array([[1, 2, 3]], np.int8)
    points, scales = np.array([[-3]], np.int8), np.ones((1, 1), np.float32)
    blocks = to_blocks(QuantizedWeight(integers, scales, points, 1, 16, 4))
    assert blocks is not None
    packed = blocks.packed()
    assert packed.shape == (1, 1, 8)
    stored = unpack(packed.reshape(-1).view(np.int8), 16, 4).view(np.uint8) & 15
    assert stored.astype(int).tolist() == [9, 10, 11, *[5] * 13]
    assert blocks.packed_points().tolist() == [[5]]
