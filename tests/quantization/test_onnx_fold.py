"""Smoothing on ONNX: folded where that is free, and the same answers as unfolded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from memopt.bundle import Bundle
from memopt.graphs.ir import from_proto, to_proto
from memopt.graphs.linears import onnx_linears
from memopt.graphs.observe import observer
from memopt.quantization.math.smooth import Smoothing
from memopt.quantization.methods import static_qdq as onnx_static
from memopt.quantization.methods.fold import fold_smoothing
from memopt.quantization.quantize import Samples, float_variant, make_context, read_samples
from memopt.quantization.recipe import Recipe

RNG = np.random.default_rng(0)


def values(model: Any, folder: Path, names: list[str], feed: dict[str, Any]) -> list[np.ndarray]:
    """What a model computes inside."""
    file = folder / "model.onnx"
    file.write_bytes(model.SerializeToString())
    return list(observer(file, "onnx", names)(feed))


def run(model: Any, feed: dict[str, Any]) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {item.name for item in session.get_inputs()}
    given = {name: value for name, value in feed.items() if name in wanted}
    return np.asarray(session.run(["sentence_embedding"], given)[0])


def test_only_activations_behind_gelu_are_smoothed_at_run_time(
    tiny_exported: Bundle, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LayerNorm and attention make their smoothed outputs themselves, with the same answers."""
    samples = Samples(calibration=texts, samples=16, validation_samples=16)
    recipe = Recipe(method="static", target="cpu", smooth=0.7)
    base = float_variant(tiny_exported, recipe)
    calibration, _ = read_samples(tiny_exported, samples)
    context = make_context(tiny_exported, base, recipe, calibration, samples)
    make = onnx_static.prepare(context)
    folded = make(()).model
    monkeypatch.setattr(onnx_static, "fold_smoothing", lambda *given: (set(), given[-1]))
    plain = make(()).model
    makers = {name: node.op_type for node in folded.graph.node for name in node.output}
    smoothed = [
        [makers[n.input[0]] for n in model.graph.node if n.input[-1].endswith("/factor")]
        for model in (folded, plain)
    ]
    assert smoothed[0] == ["Gelu", "Gelu"]
    assert len(smoothed[1]) == 8
    for _, feed in zip(range(3), context.feeds(), strict=False):
        a, b = run(folded, dict(feed)), run(plain, dict(feed))
        assert (a * b).sum(1).min() > 0.9999


def norm_graph(*, residual: bool) -> Any:
    """x + bias -> LayerNormalization -> two products, and a residual sum of it where asked."""
    width = 8
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma"], ["normed"], name="norm"),
        helper.make_node("MatMul", ["normed", "first"], ["a"], name="one"),
        helper.make_node("MatMul", ["normed", "second"], ["b"], name="two"),
        helper.make_node("Add", ["a", "bias"], ["c"], name="biased"),
        helper.make_node("Add", ["c", "normed" if residual else "b"], ["out"], name="sum"),
    ]
    arrays = {
        "gamma": RNG.uniform(0.5, 2, width),
        "first": RNG.normal(size=(width, width)),
        "second": RNG.normal(size=(width, width)),
        "bias": RNG.normal(size=width),
    }
    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])
        for name in ("x", "out", "b")
    ]
    stored = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
    graph = helper.make_graph(nodes, "norm", value[:1], value[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("residual", [False, True])
def test_a_norm_makes_the_smoothed_value_and_a_residual_gets_its_own(
    residual: bool, tmp_path: Path
) -> None:
    """(x - low) / divisor under the old name; what else reads x still sees x."""
    model = norm_graph(residual=residual)
    feed = {"x": RNG.normal(size=(5, 8)).astype(np.float32)}
    (before,) = values(model, tmp_path, ["normed"], feed)
    plan = Smoothing(
        low=RNG.normal(size=8).astype(np.float32),
        divisor=RNG.uniform(0.5, 2, 8).astype(np.float32),
        scale=1.0, alpha=0.5, error=0.0,
    )  # fmt: skip
    bias = numpy_helper.to_array(model.graph.initializer[3])
    graph = from_proto(model)
    done, _ = fold_smoothing(graph, onnx_linears(graph), {"normed": plan}, {})
    assert done == {"normed"}
    names = ["normed", "a", "out"]
    after, product, total = values(to_proto(graph), tmp_path, names, feed)
    assert np.allclose(after, (before - plan.low) / plan.divisor, atol=1e-5)
    if residual:
        assert np.allclose(total, product + bias + before, atol=1e-5)


def test_a_value_that_others_read_is_left_alone() -> None:
    """A norm whose output is the model's own output keeps making it."""
    model = norm_graph(residual=False)
    model.graph.output.append(helper.make_tensor_value_info("normed", TensorProto.FLOAT, ["n", 8]))
    plan = Smoothing(
        low=np.ones(8, np.float32), divisor=np.ones(8, np.float32), scale=1.0, alpha=0.5, error=0.0
    )
    graph = from_proto(model)
    assert fold_smoothing(graph, onnx_linears(graph), {"normed": plan}, {}) == (set(), {})
