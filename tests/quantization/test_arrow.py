"""ArrowQuantizer: V1 to V2, and calibration from a bundle's own graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from memopt.bundle import Bundle, Manifest, Variant, create_bundle
from memopt.errors import ConfigurationError, QuantizationError, WeightsError
from memopt.quantization.arrow import ArrowQuantizer
from memopt.quantization.math.hessians import Calibrated, Feeds, GraphCalibration
from memopt.weights.reader import WeightLoader
from memopt.weights.writer import write_weights

RNG = np.random.default_rng(0)
WEIGHTS = {
    "embed.weight": RNG.standard_normal((20, 32)).astype(np.float32),
    "layer.0.query.weight": RNG.standard_normal((32, 32)).astype(np.float32),
    "layer.0.query.bias": RNG.standard_normal(32).astype(np.float32),
    "layer.0.wide.weight": RNG.standard_normal((48, 32)).astype(np.float32),
    "layer.1.conv1d.weight": RNG.standard_normal((48, 16)).astype(np.float32),
    "position_ids": np.arange(20),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small V1 file."""
    write_weights(tmp_path / "weights.parquet", WEIGHTS)
    return tmp_path / "weights.parquet"


def tiny_bundle(folder: Path, *, external: bool = False) -> Bundle:
    """Embedding, a square MatMul (transposed), a Gemm with transB, a Conv1D MatMul (as it is)."""
    w = WEIGHTS
    arrays = {
        "embed.weight": w["embed.weight"],
        "layer.0.query.weight": w["layer.0.query.weight"].T,
        "layer.0.query.bias": w["layer.0.query.bias"],
        "layer.0.wide.weight": w["layer.0.wide.weight"],
        "layer.1.conv1d.weight": w["layer.1.conv1d.weight"],
        "flat": np.array([-1, 32]),
    }
    nodes = [
        helper.make_node("Gather", ["embed.weight", "input_ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "layer.0.query.weight"], ["product"]),
        helper.make_node("Add", ["product", "layer.0.query.bias"], ["query"]),
        helper.make_node("Reshape", ["query", "flat"], ["rows"]),
        helper.make_node("Gemm", ["rows", "layer.0.wide.weight"], ["wide"], transB=1),
        helper.make_node("MatMul", ["wide", "layer.1.conv1d.weight"], ["out"]),
    ]
    ids = helper.make_tensor_value_info("input_ids", 7, ["batch", "sequence"])
    out = helper.make_tensor_value_info("out", 1, [None, 16])
    initializers = [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in arrays.items()]
    graph = helper.make_graph(nodes, "tiny", [ids], [out], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "onnx").mkdir(parents=True)
    onnx.save_model(
        model,
        folder / "onnx" / "model.onnx",
        save_as_external_data=external,
        location="model.onnx.data" if external else None,
        size_threshold=1024,  # shapes stay inside, as exporters write them
    )
    write_weights(folder / "weights.parquet", w)
    manifest = Manifest(
        name="tiny", task="embedding", modality="text", architecture="T", model_type="t"
    )
    made = create_bundle(folder, manifest)
    variant = Variant(name="onnx-fp32", format="onnx", precision="fp32", file="onnx/model.onnx")
    return made.add_variants(variant, event={"event": "export"})


def feeds() -> Iterator[dict[str, np.ndarray]]:
    """Three batches; the second row of each is padding from the fourth token on."""
    rng = np.random.default_rng(3)
    for length in (5, 9, 7):
        mask = np.ones((2, length), np.int64)
        mask[1, 3:] = 0
        yield {"input_ids": rng.integers(0, 20, (2, length)), "attention_mask": mask}


def test_matrices_become_integers_and_the_rest_is_kept(source: Path, tmp_path: Path) -> None:
    """int8 takes about a quarter of float32; vectors are float16, integer buffers exact."""
    report = ArrowQuantizer().quantize(source, tmp_path / "q.parquet")
    kinds = {layer.name: layer.kind for layer in report.layers}
    assert kinds == {n: "rtn" if a.ndim == 2 else "kept" for n, a in WEIGHTS.items()}
    with WeightLoader(report.path) as loader:
        assert loader.version == 2
        assert loader.names() == list(WEIGHTS)
        for name, weight in WEIGHTS.items():
            found = loader.load(name)
            if name == "position_ids":
                assert np.array_equal(found, weight)
                continue
            limit = np.abs(weight).max() / 127 / 2 if weight.ndim == 2 else 2e-3
            assert np.abs(found.astype(np.float32) - weight).max() <= limit * 1.001
        assert all(layer.error < 0.01 for layer in report.quantized)


def test_the_same_weights_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    """Quantizing twice writes identical files."""
    files = [tmp_path / name for name in ("a.parquet", "b.parquet")]
    for file in files:
        ArrowQuantizer(bits=4, group_size=16).quantize(source, file)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8, "axis": -1},
        {"bits": 8, "axis": 1, "symmetric": False},
        {"bits": 4, "group_size": 16},
        {"bits": 2, "group_size": 5, "symmetric": False},
    ],
)
def test_granularities(source: Path, tmp_path: Path, options: dict[str, object]) -> None:
    """Per tensor, per channel of another axis and groups that do not divide the width."""
    quantizer = ArrowQuantizer(**options)  # type: ignore[arg-type]
    report = quantizer.quantize(source, tmp_path / "q.parquet")
    with WeightLoader(report.path) as loader:
        made = loader.load_quantized("layer.0.wide.weight")
    assert made.bits == options["bits"]
    assert made.group_size == options.get("group_size", 0)
    assert made.axis == options.get("axis", 1)


def test_layers_are_kept_by_pattern(source: Path, tmp_path: Path) -> None:
    """A pattern keeps a weight or a whole layer in float16; one that matches nothing is refused."""
    quantizer = ArrowQuantizer(keep=("layer.0.query", "*conv1d.weight"))
    report = quantizer.quantize(source, tmp_path / "q.parquet")
    assert [r.name for r in report.quantized] == ["embed.weight", "layer.0.wide.weight"]
    with pytest.raises(ConfigurationError, match=r"layer\.0\.quary.*layer\.0\.query"):
        ArrowQuantizer(keep=("layer.0.quary",)).quantize(source, tmp_path / "q.parquet")


def test_nan_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    """A NaN in any weight, kept ones too, names it; no file appears."""
    for bad in ("a.weight", "a.bias"):
        weights = {"a.weight": np.eye(4, dtype=np.float32), "a.bias": np.ones(4, np.float32)}
        weights[bad].reshape(-1)[1] = np.nan
        write_weights(tmp_path / "w.parquet", weights)
        with pytest.raises(QuantizationError, match=f"'{bad}' holds"):
            ArrowQuantizer().quantize(tmp_path / "w.parquet", tmp_path / "q.parquet")
        assert not (tmp_path / "q.parquet").exists()


def test_a_quantized_file_is_not_quantized_again(source: Path, tmp_path: Path) -> None:
    """V2 as input is refused."""
    ArrowQuantizer().quantize(source, tmp_path / "q.parquet")
    with pytest.raises(QuantizationError, match="already quantized"):
        ArrowQuantizer().quantize(tmp_path / "q.parquet", tmp_path / "r.parquet")


def test_bad_settings() -> None:
    """Widths, algorithms and GPTQ without calibration are refused."""
    for options in ({"bits": 3}, {"algorithm": "awq"}, {"algorithm": "gptq", "axis": 1}):
        with pytest.raises(QuantizationError):
            ArrowQuantizer(**options)  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match="gptq without calibration"):
        ArrowQuantizer(algorithm="gptq").quantize(Path("x"), Path("y"))


def calibration_of(bundle: Bundle, feeds: Feeds, **options: int) -> GraphCalibration:
    """What calibration sees in a bundle's portable graph."""
    graph = bundle.path / "onnx" / "model.onnx"
    return GraphCalibration(bundle.weights, graph, feeds, **options)


@pytest.mark.parametrize("external", [False, True])
def test_hessians_come_from_the_graph(tmp_path: Path, external: bool) -> None:
    """Each layer's Hessian is that of its true inputs, padding left out, whatever the layout."""
    bundle = tiny_bundle(tmp_path / "tiny", external=external)
    before = sorted(p.name for p in (bundle.path / "onnx").iterdir())
    calibration = calibration_of(bundle, feeds)
    inputs = np.concatenate(
        [WEIGHTS["embed.weight"][f["input_ids"]][f["attention_mask"] == 1] for f in feeds()]
    )
    seen = calibration("layer.0.query.weight")
    assert seen is not None
    assert seen.input_axis == 1
    assert np.allclose(seen.hessian, inputs.T @ inputs / len(inputs), atol=1e-4)
    axes = {name: calibration(name).input_axis for name in calibration.names}  # type: ignore[union-attr]
    assert axes == {
        "layer.0.query.weight": 1,
        "layer.0.wide.weight": 1,
        "layer.1.conv1d.weight": 0,
    }
    assert calibration("embed.weight") is None
    assert sorted(p.name for p in (bundle.path / "onnx").iterdir()) == before


def test_hessians_are_done_in_groups_that_fit(tmp_path: Path) -> None:
    """A small memory limit takes more passes and gives the same Hessians."""
    bundle = tiny_bundle(tmp_path / "tiny")
    one, many = calibration_of(bundle, feeds), calibration_of(bundle, feeds, group_bytes=1)
    for name in one.names:
        a, b = one(name), many(name)
        assert a is not None
        assert b is not None
        assert np.array_equal(a.hessian, b.hessian)
    assert (one.passes, many.passes) == (1, 3)


def test_gptq_through_the_bundle(tmp_path: Path) -> None:
    """GPTQ on the bundle's own activations lowers every linear layer's output error."""
    bundle = tiny_bundle(tmp_path / "tiny")
    calibration = calibration_of(bundle, feeds)
    reports = {
        algorithm: ArrowQuantizer(bits=4, algorithm=algorithm).quantize(
            bundle.weights, tmp_path / f"{algorithm}.parquet", calibration=calibration
        )
        for algorithm in ("rtn", "gptq")
    }
    errors = {
        algorithm: {r.name: r.output_error for r in report.quantized if r.output_error}
        for algorithm, report in reports.items()
    }
    assert set(errors["gptq"]) == set(calibration.names)
    assert all(errors["gptq"][n] < errors["rtn"][n] for n in calibration.names)
    for report in reports.values():
        with WeightLoader(report.path) as loader:
            assert loader.version == 2


def test_conv1d_weights_are_turned_for_gptq() -> None:
    """A weight stored (in, out) is quantized as its transpose is."""
    w = WEIGHTS["layer.1.conv1d.weight"]
    x = np.random.default_rng(0).standard_normal((100, 48)).astype(np.float32)
    quantizer = ArrowQuantizer(bits=4, group_size=16, algorithm="gptq")
    plain = quantizer.quantize_one("w", w, Calibrated(x.T @ x, 0))
    turned = quantizer.quantize_one("w", np.ascontiguousarray(w.T), Calibrated(x.T @ x, 1))
    assert np.array_equal(plain.integers, turned.integers.T)
    assert np.array_equal(plain.dequantize(), turned.dequantize().T)


def test_a_graph_of_other_weights_is_refused(tmp_path: Path) -> None:
    """Calibrating with a graph that was not made of this weight file names the weight."""
    bundle = tiny_bundle(tmp_path / "tiny")
    other = {**WEIGHTS, "layer.0.query.weight": WEIGHTS["layer.0.query.weight"] + 1}
    write_weights(bundle.weights, other)
    with pytest.raises(WeightsError, match=r"layer\.0\.query\.weight"):
        calibration_of(bundle, feeds)
