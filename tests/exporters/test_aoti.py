"""Packages compiled ahead of time, and the packed rows they are given on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memopt.bundle import Bundle, open_bundle
from memopt.errors import BundleError, DeviceError, ExportError
from memopt.exporters import aoti
from memopt.exporters.base import export
from memopt.runtimes.aoti import Package
from memopt.runtimes.engine import ArrowEngine
from tests.exporters.kit import built, prepared

TEXTS = ["a cat", "the dog and the cat", "z", "a b c d e f g h i j k", "the cat"]


def record(model: Any, pooling: str = "mean") -> dict[str, Any]:
    """How packed rows of a seeded model compare with torch's own padded ones."""
    loaded, signature, cases = prepared(model, pooling, normalize=False)
    answer = signature.outputs[-1]
    cases = [(feeds, {answer: expected[answer]}) for feeds, expected in cases]
    return aoti.packed_answers(loaded, signature, cases)


@pytest.mark.parametrize(
    ("config", "model", "pooling", "further"),
    [
        ("BertConfig", "BertModel", "cls", {}),
        ("RobertaConfig", "RobertaModel", "mean", {"max_position_embeddings": 66}),
        ("ElectraConfig", "ElectraModel", "mean", {"embedding_size": 32}),
        (
            "ModernBertConfig",
            "ModernBertModel",
            "mean",
            {"local_attention": 8, "global_attn_every_n_layers": 2},
        ),
        ("Qwen3Config", "Qwen3Model", "last", {"num_key_value_heads": 2, "head_dim": 8}),
    ],
)
def test_packed_rows_answer_as_padded_ones(
    config: str, model: str, pooling: str, further: dict[str, Any]
) -> None:
    """Positions, windows, causal masks and shared heads stay within each row."""
    assert record(built(config, model, **further), pooling)["min_cosine"] > 0.99999


def test_a_model_that_adds_to_its_scores_takes_no_packed_rows() -> None:
    """MPNet's position biases are of a whole row of tokens: it is compiled for padded rows."""
    with pytest.raises((ExportError, ValueError, RuntimeError, TypeError)):
        record(built("MPNetConfig", "MPNetModel", max_position_embeddings=66))


@pytest.fixture(scope="module")
def packaged(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny BERT with a package for this machine's processor, compiled by this user."""
    import shutil

    folder = tmp_path_factory.mktemp("packaged")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    bundle = open_bundle(shutil.copytree(tiny.path, folder / "tiny"))
    export(bundle, format="torch-aoti")
    patch.undo()
    return open_bundle(bundle.path)


def test_a_package_answers_as_torch_does(packaged: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many texts, one, and none; the package is taken by itself where it was compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(packaged.path.parent / "cache"))
    with ArrowEngine(packaged) as engine, ArrowEngine(packaged, device="torch") as torch_engine:
        assert engine.device_info()["device"] == "aoti"
        assert not engine.events
        for texts in (TEXTS, TEXTS[:1], []):
            np.testing.assert_allclose(engine.encode(texts), torch_engine.encode(texts), atol=1e-5)


def test_a_package_from_elsewhere_is_opened_only_by_name(
    packaged: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is native code: whoever sends a bundle must not have it run unasked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BundleError, match="native code"):
        ArrowEngine(packaged)
    with ArrowEngine(packaged, device="aoti") as engine:
        assert engine.encode(TEXTS).shape == (len(TEXTS), 32)


def test_a_changed_package_is_not_opened(packaged: Bundle, tmp_path: Path) -> None:
    """Not even where hashes are not looked at: its code would run."""
    import shutil

    copy = open_bundle(shutil.copytree(packaged.path, tmp_path / "copy"))
    file = copy.file(copy.variant("torch-aoti-fp32"))
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(BundleError, match=r"torch-aoti/model\.pt2"):
        ArrowEngine(copy, device="aoti", verify="never")


def test_a_package_of_another_torch_is_refused(packaged: Bundle) -> None:
    """It says what it was compiled for, and what is here."""
    variant = packaged.variant("torch-aoti-fp32")
    with pytest.raises(DeviceError, match=r"compiled for torch 1\.0.*and here is torch 2"):
        Package(packaged.file(variant), {**variant.options, "torch": "1.0"}, runners=1)


def test_float16_is_refused_where_activations_pass_its_range(
    tiny_source: Path, tmp_path: Path
) -> None:
    """And the layer is named."""
    import shutil

    from safetensors.torch import load_file, save_file

    from memopt.weights.convert import convert

    folder = Path(shutil.copytree(tiny_source, tmp_path / "loud"))
    weights = load_file(folder / "model.safetensors")
    name = "encoder.layer.0.intermediate.dense.bias"
    weights[name] = torch.full_like(weights[name], 1e5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    bundle = convert(str(folder), tmp_path / "bundle")
    with pytest.raises(ExportError, match=r"layer\.0\.\S+ reach 1e\+05.*bf16"):
        export(bundle, format="torch-aoti", precision="fp16")
    assert not json.loads((bundle.path / "memopt.json").read_text())["variants"]
