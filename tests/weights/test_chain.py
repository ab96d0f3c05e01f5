"""Modules behind the model answer as sentence-transformers' own do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Dropout, LayerNorm, Normalize, Pooling, Transformer

from memopt import ArrowEngine
from memopt.bundle import open_bundle
from memopt.errors import ExportError, WeightsError
from memopt.exporters import examples, interface
from memopt.exporters.base import export
from memopt.runtimes.torch_model import load_model
from memopt.weights.chain import ACTIVATIONS
from memopt.weights.convert import convert, to_safetensors
from memopt.weights.sentence import read_sentence
from tests.parameters import mostly_slow

TEXTS = ["a cat", "The dog, the cat and a Dog " * 3, "", "x"]
TOKENS = "token_embeddings"


def norm(width: int) -> LayerNorm:
    """A layer norm that is not the one a new model begins with."""
    module = LayerNorm(width)
    module.norm.weight.data.uniform_(0.5, 2)
    module.norm.bias.data.normal_()
    return module


CHAINS: dict[str, Callable[[], list[Any]]] = {
    "dense": lambda: [Pooling(32), Dense(32, 16)],
    "dense and normalize": lambda: [Pooling(32, "cls"), Dense(32, 16), Normalize()],
    "normalize and dense": lambda: [
        Pooling(32),
        Normalize(),
        Dense(32, 16, bias=False, activation_function=torch.nn.Identity()),
    ],
    "two dense": lambda: [
        Pooling(32, ("mean", "max")),
        Dense(64, 24, activation_function=torch.nn.ReLU()),
        Dropout(0.5),
        Dense(24, 8, activation_function=torch.nn.GELU(), use_residual=True),
        Normalize(),
    ],
    "dense on tokens": lambda: [
        Dense(32, 12, module_input_name=TOKENS, activation_function=torch.nn.SiLU()),
        Pooling(12, "weightedmean"),
    ],
    "residual": lambda: [Pooling(32), Dense(32, 32, use_residual=True)],
    "layer norm": lambda: [Pooling(32, "mean_sqrt_len_tokens"), norm(32), Dense(32, 4), norm(4)],
    "to another name": lambda: [
        Pooling(32),
        Dense(32, 16, module_output_name="beside"),
        Normalize("beside", "sentence_embedding"),
    ],
}


def saved(tiny_source: Path, folder: Path, name: str) -> Path:
    torch.manual_seed(1)
    model = SentenceTransformer(modules=[Transformer(str(tiny_source)), *CHAINS[name]()])
    model.save(str(folder))
    return folder


def theirs(folder: Path) -> np.ndarray:
    return np.asarray(SentenceTransformer(str(folder), device="cpu").encode(TEXTS))


@pytest.mark.parametrize("name", CHAINS)
def test_every_module_answers_as_sentence_transformers(
    tiny_source: Path, tmp_path: Path, name: str
) -> None:
    """Vectors are equal, the manifest knows their length, and the files come back as they were."""
    source = saved(tiny_source, tmp_path / "source", name)
    wanted = theirs(source)
    bundle = convert(source, tmp_path / "bundle", on_warning=pytest.fail)
    assert bundle.manifest.pooling == "chain"
    assert bundle.manifest.dimension == wanted.shape[1]
    with ArrowEngine(bundle, device="torch") as engine:
        np.testing.assert_allclose(engine.encode(TEXTS, normalize=False), wanted, atol=1e-5)
    to_safetensors(bundle)
    for file in source.rglob("*.safetensors"):
        assert (bundle.path / file.relative_to(source)).read_bytes() == file.read_bytes()
    np.testing.assert_allclose(theirs(bundle.path), wanted, atol=1e-6)


@pytest.mark.parametrize("name", CHAINS)
def test_the_graph_and_the_reference_are_written_apart(
    tiny_source: Path, tmp_path: Path, name: str
) -> None:
    """Torch and numpy agree on both sides of padding, step by step."""
    bundle = convert(saved(tiny_source, tmp_path / "source", name), tmp_path / "bundle")
    loaded = load_model(bundle, "embedding")
    names = interface.signature(loaded, bundle.manifest, "embedding").inputs
    module = interface.wrap(loaded, bundle.manifest, "embedding")
    for side in ("left", "right"):
        feeds = examples.example(loaded, names, examples.Shape(4, 9, side), seed=2)
        wanted = interface.reference(loaded, bundle.manifest, "embedding", feeds)
        with torch.no_grad():
            got = module(*(torch.from_numpy(feeds[name]) for name in names))[-1]
        np.testing.assert_allclose(got, wanted["sentence_embedding"], atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_torch_s_own(activation: str) -> None:
    """The numpy side of every activation equals torch's class of that name."""
    from memopt.exporters.chain import _ACTIVATIONS

    values = torch.linspace(-6, 6, 97, dtype=torch.float64)
    wanted = getattr(torch.nn, activation)()(values)
    np.testing.assert_allclose(_ACTIVATIONS[activation](values.numpy()), wanted, atol=1e-7)


@pytest.mark.parametrize("device", mostly_slow(["cpu", "openvino"], "cpu"))
def test_a_chain_is_in_every_graph(tiny_source: Path, tmp_path: Path, device: str) -> None:
    """Both formats give sentence-transformers' vectors, and name the modules' weights."""
    source = saved(tiny_source, tmp_path / "source", "two dense")
    bundle = convert(source, tmp_path / "bundle")
    export(bundle, format="onnx" if device == "cpu" else device)
    with ArrowEngine(bundle.path, device=device) as engine:
        assert engine.dimension == 8
        got = engine.encode(TEXTS, normalize=False)
    np.testing.assert_allclose(got, theirs(source), atol=1e-5)
    if device == "cpu":
        import onnx

        graph = onnx.load(str(bundle.path / "onnx" / "model.onnx")).graph
        names = {tensor.name for tensor in graph.initializer}
        assert {"2_Dense.linear.weight", "4_Dense.residual.weight"} <= names


def test_a_simple_pipeline_keeps_its_word(tiny_source: Path) -> None:
    """Pooling in one mode and Normalize is what the manifest's own fields say, as before."""
    sentence = read_sentence(tiny_source)
    assert sentence is not None
    assert (sentence.pooling, sentence.normalize, sentence.width) == ("mean", True, 32)


def test_weights_that_do_not_fit_their_module_are_refused(
    tiny_source: Path, tmp_path: Path
) -> None:
    """Another shape, a missing file and a bundle without the folder are one line each."""
    source = saved(tiny_source, tmp_path / "source", "dense")
    config = source / "2_Dense" / "config.json"
    whole = config.read_text()
    bundle = convert(source, tmp_path / "whole")
    config.write_text(whole.replace('"out_features": 16', '"out_features": 17'))
    with pytest.raises(WeightsError, match=r"2_Dense\.linear\.\w+ is .*16"):
        convert(source, tmp_path / "bundle")
    config.write_text(whole.replace("activation.Tanh", "activation.Softmax"))
    with pytest.raises(WeightsError, match=r"Softmax.*\n?.*"):
        convert(source, tmp_path / "bundle")
    config.write_text(whole)
    (source / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"2_Dense has no \.safetensors"):
        convert(source, tmp_path / "bundle")
    shutil.copy(config, bundle.path / "2_Dense" / "config.json")
    (bundle.path / "modules.json").unlink()
    with pytest.raises(ExportError, match=r"no modules\.json"):
        load_model(open_bundle(bundle.path), "embedding")
