"""Whatever writes into a bundle: no manifest entry, no file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from memopt.bundle import Bundle, Manifest, open_bundle
from memopt.exporters.base import export
from memopt.exporters.from_v2 import export_v2
from memopt.quantization.accuracy.gate import Gate
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe
from memopt.weights.convert import convert


def other_source(folder: Path, source: Path) -> Path:
    """The same model with one other weight."""
    copy = Path(shutil.copytree(source, folder / "other"))
    weights = safetensors.numpy.load_file(copy / "model.safetensors")
    weights["pooler.dense.bias"] = weights["pooler.dense.bias"] + 1
    safetensors.numpy.save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def few(texts: Path) -> Samples:
    """Enough to quantize the tiny model."""
    return Samples(calibration=texts, samples=8, validation_samples=8)


def arrow(bundle: Bundle, texts: Path, **recipe: Any) -> object:
    """Quantize the weights, whatever that costs."""
    chosen = Recipe(method="arrow", **recipe)
    return quantize(bundle, few(texts), chosen, gate=Gate(min_cosine=0.5))


# Each gets a bundle, a source of another model, and texts.
WRITERS: dict[str, Callable[[Bundle, Path, Path], object]] = {
    "convert": lambda b, source, _: convert(str(source), b.path),
    "export onnx": lambda b, *_: export(b, format="onnx", opset=21),
    "export openvino": lambda b, *_: export(b, format="openvino", precision="fp16"),
    "quantize": lambda b, _, texts: quantize(b, few(texts), Recipe(method="dynamic")),
    "arrow": lambda b, _, texts: arrow(b, texts, weight_type="int4"),
    "arrow gptq": lambda b, _, texts: arrow(b, texts, weight_type="int4", algorithm="gptq"),
    "export of arrow": lambda b, *_: export_v2(b, "weights_int8.parquet"),
}


def state(folder: Path) -> dict[str, bytes]:
    """Every file of a bundle but its lock and caches."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.relative_to(folder).parts[0].startswith(".")
    }


@pytest.mark.parametrize("what", WRITERS)
def test_what_is_not_in_the_manifest_is_not_there(
    tiny_copy: Bundle,
    tiny_source: Path,
    texts: Path,
    tmp_path: Path,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C when the manifest is written: the bundle is as it was, and the next try works."""
    arrow(tiny_copy, texts)
    bundle = open_bundle(tiny_copy.path)
    source = other_source(tmp_path, tiny_source)
    before = state(bundle.path)
    whole = Manifest.to_json

    def interrupt(manifest: Manifest) -> str:
        # The first manifest of a new bundle, which is made beside, has one event.
        if len(manifest.history) > 1:
            raise KeyboardInterrupt
        return whole(manifest)

    monkeypatch.setattr(Manifest, "to_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        WRITERS[what](bundle, source, texts)
    assert state(bundle.path) == before
    assert not list(bundle.path.glob(".staging*"))
    monkeypatch.undo()
    WRITERS[what](bundle, source, texts)
    after = open_bundle(bundle.path)
    assert after.manifest.files != bundle.manifest.files
    assert after.verify() == []
