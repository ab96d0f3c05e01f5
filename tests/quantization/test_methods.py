"""Every method on the real MiniLM: right answers, integer kernels, a quarter of the size."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memopt.bundle import Bundle, open_bundle
from memopt.errors import ConfigurationError, InputError, QuantizationError
from memopt.quantization.accuracy.gate import Gate
from memopt.quantization.accuracy.result import Result
from memopt.quantization.accuracy.validate import PrecisionValidator
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe
from memopt.weights.reader import WeightLoader

# A quarter, and what scales and what stays float take (biases, norms): the limit.
MOST_BYTES = 0.26


@pytest.fixture(scope="module")
def bundle(minilm: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A MiniLM bundle that this module's variants are added to."""
    import shutil

    folder = tmp_path_factory.mktemp("methods") / "minilm"
    shutil.copytree(minilm.path, folder, ignore=shutil.ignore_patterns(".ort-cache"))
    return open_bundle(folder)


@pytest.fixture(scope="module")
def samples(texts: Path) -> Samples:
    """Few inputs: the numbers asserted here hold with 64 as with 300."""
    return Samples(calibration=texts, samples=64, validation_samples=64)


def run(bundle: Bundle, samples: Samples, **recipe: object) -> Result:
    """Quantize, keeping a failing variant so that the test sees its numbers."""
    return quantize(bundle, samples, Recipe.from_dict(recipe), keep_failing=True)


def test_static_openvino(bundle: Bundle, samples: Samples) -> None:
    """Full int8 on OpenVINO passes 0.98 at a quarter of the size, every product in int8."""
    result = run(bundle, samples, method="static")
    assert result.validation.cosine_min is not None
    assert result.validation.cosine_min >= 0.98
    assert result.validation.cosine_mean >= 0.995
    assert result.bytes <= MOST_BYTES * result.float_bytes
    assert result.int8_macs > 0.95
    assert result.variant.passed
    assert {layer.kind for layer in result.layers} == {"int8", "int8-table"}
    assert sum(layer.name.endswith("word_embeddings.weight") for layer in result.layers) == 1
    assert any("attention.self.query.weight" in layer.name for layer in result.layers)
    recorded = open_bundle(bundle.path).variant("openvino-int8-static")
    assert recorded.validation["cosine_min"] == pytest.approx(
        result.validation.cosine_min, abs=1e-6
    )


@pytest.mark.slow
def test_static_onnx(bundle: Bundle, samples: Samples) -> None:
    """QDQ int8 lowers to MatMulIntegerToFloat for every weighted product, and is as right."""
    result = run(bundle, samples, method="static", target="cpu", smooth=0.8)
    assert result.validation.cosine_min >= 0.98
    assert result.bytes <= MOST_BYTES * result.float_bytes
    assert result.kernels.get("MatMulIntegerToFloat") == 36
    assert result.int8_macs > 0.95


def test_dynamic(bundle: Bundle, samples: Samples) -> None:
    """Dynamic int8 starts from the fused graph: attention is QAttention, tables are int8."""
    result = run(bundle, samples, method="dynamic")
    assert result.kernels["QAttention"] == 6
    assert all(0 < layer.error < 0.1 for layer in result.layers)
    assert result.bytes <= MOST_BYTES * result.float_bytes
    assert result.validation.cosine_min >= 0.95


@pytest.fixture(scope="module")
def eight(bundle: Bundle, samples: Samples) -> Result:
    """What int8 weights alone give."""
    return run(bundle, samples, method="weight-only")


@pytest.mark.slow
def test_weight_only(bundle: Bundle, samples: Samples, eight: Result) -> None:
    """int8 weights are nearly exact; at four bits GPTQ is clearly better than rounding."""
    nearest = run(bundle, samples, method="weight-only", weight_type="int4")
    gptq = run(bundle, samples, method="weight-only", weight_type="int4", algorithm="gptq")
    assert eight.validation.cosine_min >= 0.995
    assert eight.bytes <= MOST_BYTES * eight.float_bytes
    assert gptq.validation.cosine_min > nearest.validation.cosine_min + 0.01
    assert gptq.bytes == nearest.bytes
    assert not gptq.variant.passed or gptq.validation.cosine_min >= 0.98


@pytest.mark.slow
def test_nncf_weights(bundle: Bundle, samples: Samples) -> None:
    """nncf's weight compression gives an OpenVINO variant that passes."""
    result = run(bundle, samples, method="nncf-weights")
    assert result.validation.cosine_min >= 0.99
    assert result.variant.name == "openvino-int8-weight-only"


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (Recipe(method="nncf"), "openvino-int8-nncf"),
        (Recipe(method="nncf", target="cpu", smooth=0.5), "onnx-int8-nncf"),
        (Recipe(method="nncf", max_drop=0.001, ranges="percentile"), "openvino-int8-nncf"),
        (
            Recipe(method="nncf-weights", weight_type="int4", algorithm="awq+scale-estimation"),
            "openvino-int4-weight-only-awq-scale-estimation",
        ),
        (
            Recipe(method="nncf-weights", weight_type="int4", algorithm="gptq"),
            "openvino-int4-weight-only-gptq",
        ),
        (Recipe(method="nncf-weights", weight_type="nf4"), "openvino-nf4-weight-only"),
        (
            Recipe(method="nncf-weights", weight_type="int4", target="cpu"),
            "onnx-int4-nncf-weights",
        ),
        (
            Recipe(method="nncf-weights", weight_type="int4", target="cpu", symmetric=False),
            "onnx-int4-nncf-weights",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_nncf_can(tiny_copy: Bundle, texts: Path, recipe: Recipe, name: str) -> None:
    """Every mode of nncf makes a variant with an error of each layer, and keeps what it is told."""
    samples = Samples(calibration=texts, samples=16, validation_samples=16)
    kept = replace(recipe, keep_float=("*layer.1.output.dense*",))
    result = quantize(tiny_copy, samples, kept, keep_failing=True)
    assert result.name == name
    assert result.validation.cosine_min > 0.8
    (left,) = (layer for layer in result.layers if layer.kind == "float")
    assert "layer.1.output.dense" in left.name
    errors = {layer.name: layer.error for layer in result.layers if layer is not left}
    assert len(errors) == 11
    assert all(error is not None and 0 < error < 0.5 for error in errors.values())


def test_groups_that_do_not_fit_nncf(tiny_copy: Bundle, texts: Path) -> None:
    """A layer that cannot be cut into groups is one line, in nncf's words."""
    samples = Samples(calibration=texts, samples=16, validation_samples=16)
    recipe = Recipe(method="nncf-weights", weight_type="int4", target="cpu", group_size=64)
    with pytest.raises(QuantizationError, match=r"nncf refuses this recipe.*group"):
        quantize(tiny_copy, samples, recipe)


def test_the_engine_opens_each_variant_and_skips_failed_ones(
    bundle: Bundle, samples: Samples, eight: Result
) -> None:
    """The engine encodes with a named variant; one that failed its gate it never picks itself."""
    from memopt.runtimes.engine import ArrowEngine

    run(bundle, samples, method="weight-only", weight_type="int2")
    opened = open_bundle(bundle.path)
    assert opened.variant("onnx-int8-weight-only").file == eight.variant.file
    assert not opened.variant("onnx-int2-weight-only").passed
    with ArrowEngine(opened, variant="onnx-int8-weight-only") as engine:
        vectors = engine.encode(["a cat", "a dog on the street"])
    with ArrowEngine(opened, device="cpu") as engine:
        assert "int2" not in str(engine.device_info())
        assert np.all((vectors * engine.encode(["a cat", "a dog on the street"])).sum(1) > 0.97)


def test_layers_kept_in_float(tiny_copy: Bundle, texts: Path) -> None:
    """A pattern keeps its layers in float on both runtimes; an unknown one names the nearest."""
    samples = Samples(calibration=texts, samples=16, validation_samples=16)
    for target in ("cpu", "openvino"):
        recipe = Recipe(method="static", target=target, keep_float=("*layer.1.*",))
        made = quantize(tiny_copy, samples, recipe, keep_failing=True)
        kinds = {"layer.1." in layer.name: layer.kind for layer in made.layers if layer.macs}
        assert kinds == {True: "float", False: "int8"}
    with pytest.raises(ConfigurationError, match=r"nearest: .*attention"):
        quantize(tiny_copy, samples, Recipe(keep_float=("*atention.q*",)))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(method="static"),
        Recipe(method="static", target="cpu", ranges="mse"),
        Recipe(method="dynamic"),
        Recipe(method="weight-only", weight_type="int4", algorithm="gptq", symmetric=False),
        Recipe(method="weight-only", weight_type="int2", group_size=16),
    ],
    ids=lambda recipe: recipe.variant_name,
)
def test_same_inputs_same_bytes(tiny_copy: Bundle, texts: Path, recipe: Recipe) -> None:
    """Quantizing twice with the same seed writes the same bytes."""
    samples = Samples(calibration=texts, samples=16, validation_samples=16)
    first, second = (
        [
            (tiny_copy.path / name).read_bytes()
            for variant in [quantize(tiny_copy, samples, recipe, keep_failing=True).variant]
            for name in (variant.file, *variant.companions)
        ]
        for _ in range(2)
    )
    assert first == second


def test_a_failing_variant_leaves_nothing(tiny_copy: Bundle, texts: Path) -> None:
    """Without --keep-failing a variant below its gate is refused and no file or entry is left."""
    before = sorted(tiny_copy.path.rglob("*"))
    samples = Samples(calibration=texts, samples=16, validation_samples=16)
    with pytest.raises(QuantizationError, match=r"fails its gate: min cosine .* is below 1"):
        quantize(tiny_copy, samples, Recipe(), gate=Gate(min_cosine=1.0))
    assert sorted(tiny_copy.path.rglob("*")) == before
    assert "openvino-int8-static" not in open_bundle(tiny_copy.path).manifest.variants


def test_an_interrupted_run_leaves_nothing(
    tiny_copy: Bundle, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during validation leaves no staging folder, no graph and the old manifest."""
    before = {p: p.stat().st_mtime_ns for p in tiny_copy.path.rglob("*") if p.is_file()}

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PrecisionValidator, "validate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_copy, Samples(calibration=texts, samples=8, validation_samples=8))
    assert {p: p.stat().st_mtime_ns for p in tiny_copy.path.rglob("*") if p.is_file()} == before
    assert not list(tiny_copy.path.glob(".staging*"))


def test_validation_file_of_its_own_must_not_overlap(tiny_copy: Bundle, texts: Path) -> None:
    """A validation file that repeats calibration inputs is refused before any work."""
    samples = Samples(calibration=texts, validation=texts, samples=200, validation_samples=200)
    with pytest.raises(QuantizationError, match="are calibration inputs too"):
        quantize(tiny_copy, samples)


def test_wrong_modality(tiny_copy: Bundle, tmp_path: Path) -> None:
    """A folder of images for a text model is one clear error."""
    with pytest.raises(InputError, match="is a folder, and this is a text model"):
        quantize(tiny_copy, Samples(calibration=tmp_path))


def test_arrow_method(tiny_copy: Bundle, texts: Path) -> None:
    """``arrow`` writes V2 weights once a graph with those numbers passes, and nothing otherwise."""
    samples = Samples(calibration=texts, samples=16, validation_samples=16)
    recipe = Recipe(method="arrow", weight_type="int4", algorithm="gptq", granularity="per-group")
    done = quantize(tiny_copy, samples, recipe, gate=Gate(min_cosine=0.5))
    assert done.passed
    assert (tiny_copy.path / "weights_int4_gptq.parquet").is_file()
    assert open_bundle(tiny_copy.path).manifest.history[-1]["validation"]["cosine_min"] > 0.5
    with pytest.raises(QuantizationError, match="fails its gate"):
        quantize(tiny_copy, samples, replace(recipe, weight_type="int2"), gate=Gate(min_cosine=1.0))
    assert not (tiny_copy.path / "weights_int2_gptq.parquet").exists()


def test_arrow_searches_and_reports(tiny_copy: Bundle, texts: Path, tmp_path: Path) -> None:
    """The search keeps weights in float16 until the gate passes; the report shows it."""
    from memopt.quantization.accuracy.report import write_report

    samples = Samples(calibration=texts, samples=16, validation_samples=16)
    recipe = Recipe(method="arrow", weight_type="int2")
    plain = quantize(tiny_copy, samples, recipe, gate=Gate(), keep_failing=True)
    gate = Gate(min_cosine=plain.validation.cosine_min + 0.02)
    done = quantize(tiny_copy, samples, recipe, gate=gate, budget=600)
    assert done.passed
    kept = done.recipe["keep_float"]
    assert kept
    assert {layer.name for layer in done.layers if layer.kind == "float"} == set(kept)
    with WeightLoader(tiny_copy.path / done.file) as loader:
        assert all(loader.info(name).quant_type == "fp16" for name in kept)
    write_report(done, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for heading in ("Error by layer", "Worst inputs", "Search", "Size and speed", "Recipe"):
        assert f"<h2>{heading}</h2>" in page
    assert kept[0] in page


def test_a_graph_of_arrow_weights_has_their_verdict(tiny_copy: Bundle, texts: Path) -> None:
    """What quantizing found is the graph's too; unknown weights have none; `info` shows it."""
    from typer.testing import CliRunner

    from memopt.cli import app
    from memopt.exporters.from_v2 import export_v2

    samples = Samples(calibration=texts, samples=16, validation_samples=16)
    recipe = Recipe(method="arrow", weight_type="int4")
    for bound, passes in ((0.5, True), (1.0, False)):
        gate = Gate(min_cosine=bound)
        done = quantize(tiny_copy, samples, recipe, gate=gate, keep_failing=True)
        variant = export_v2(open_bundle(tiny_copy.path), done.file)
        assert variant.passed is passes
        assert variant.validation is not None
        assert variant.validation["gate"]["min_cosine"] == bound
        shown = CliRunner().invoke(app, ["info", str(tiny_copy.path)]).output
        (row,) = (line for line in shown.splitlines() if "weights (V2)" in line)
        assert done.file in row
        assert ("NO" in row) is not passes
    unknown = tiny_copy.path / "other.parquet"
    unknown.write_bytes((tiny_copy.path / done.file).read_bytes())
    assert export_v2(open_bundle(tiny_copy.path), unknown).validation is None


def test_report_is_self_contained(tiny_copy: Bundle, texts: Path, tmp_path: Path) -> None:
    """The report holds its pictures and the worst inputs, escaped, and asks for nothing."""
    from memopt.quantization.accuracy.report import write_report

    samples = Samples(calibration=texts, samples=16, validation_samples=16)
    result = quantize(tiny_copy, samples, Recipe(), keep_failing=True)
    worst = replace(result.validation, worst=(("<script>alert(1)</script>", 0.5),))
    write_report(replace(result, validation=worst), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('class="chart"') >= 3
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    own = re.sub("<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "<script" not in own
    assert "src=" not in own
    assert "Worst inputs" in page
    assert result.model in own
    assert result.at in own
    assert texts.name in own
