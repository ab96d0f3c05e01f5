"""Prompts and dimensions of a call are those of sentence-transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from memopt import ArrowEngine
from memopt.bundle import open_bundle
from memopt.cli import app
from memopt.errors import BundleError, ConfigurationError
from memopt.exporters.base import export
from memopt.runtimes.testing import fake_engine
from memopt.runtimes.text import TextFrontEnd
from memopt.weights.convert import convert

TEXTS = ["a cat", "The dog, the cat and a Dog " * 3, "", "x"]
PROMPTS = {"query": "the dog ", "passage": "a cat and the dog and the cat "}
CALLS: tuple[dict[str, Any], ...] = (
    {},
    {"prompt_name": "query"},
    {"prompt_name": "document"},
    {"prompt_name": "passage"},
    {"prompt": "x y z "},
    {"prompt": ""},
)


@pytest.fixture(scope="module")
def source(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with named prompts that its pooling leaves out."""
    folder = Path(shutil.copytree(tiny_source, tmp_path_factory.mktemp("prompts") / "source"))
    settings = {"prompts": PROMPTS, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    pooling = {"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def theirs(folder: Path, **call: Any) -> np.ndarray:
    return np.asarray(SentenceTransformer(str(folder), device="cpu").encode(TEXTS, **call))


@pytest.mark.parametrize("device", ["torch", "cpu"])
def test_a_prompt_of_a_call_is_left_out_of_pooling(
    source: Path, tmp_path: Path, device: str
) -> None:
    """Whatever the prompt's length, its tokens are seen and not pooled, in torch and in a graph."""
    bundle = convert(source, tmp_path / "bundle")
    if device == "cpu":
        (variant, *_) = export(bundle)
        assert "pooling_mask" in variant.inputs
    with ArrowEngine(bundle.path, device=device) as engine:
        for call in CALLS:
            got = engine.encode(TEXTS, normalize=False, **call)
            np.testing.assert_allclose(got, theirs(source, **call), atol=1e-5)


def test_a_prompt_that_is_pooled_needs_no_further_input(tiny_source: Path, tmp_path: Path) -> None:
    """The prompts of an ordinary model are only put before the text."""
    folder = Path(shutil.copytree(tiny_source, tmp_path / "source"))
    settings = {"prompts": PROMPTS, "default_prompt_name": "passage"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with ArrowEngine(convert(folder, tmp_path / "bundle"), device="torch") as engine:
        for call in CALLS:
            got = engine.encode(TEXTS, normalize=False, **call)
            np.testing.assert_allclose(got, theirs(folder, **call), atol=1e-5)
        assert engine.encode("a cat", prompt="x ").shape == (32,)


def test_a_graph_made_for_one_prompt_refuses_others(source: Path, tmp_path: Path) -> None:
    """An older graph has its default prompt's length inside."""
    bundle = convert(source, tmp_path / "bundle")
    front = TextFrontEnd(bundle, ("input_ids", "attention_mask"))
    assert front.with_prompt(PROMPTS["query"]) is front
    with pytest.raises(BundleError, match=r"'the dog '.*memopt export"):
        front.with_prompt("x ")


@pytest.mark.parametrize("normalize", [True, False])
def test_a_vector_is_cut_before_it_is_made_unit_length(tiny_copy: Any, normalize: bool) -> None:
    """As truncate_dim and normalize_embeddings of sentence-transformers."""
    from memopt.weights.convert import to_safetensors

    to_safetensors(tiny_copy)
    wanted = theirs(tiny_copy.path, truncate_dim=8, normalize_embeddings=normalize)
    with ArrowEngine(tiny_copy, device="torch") as engine:
        got = engine.encode(TEXTS, dimension=8, normalize=normalize)
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        arrow = engine.encode(TEXTS, dimension=8, normalize=normalize, output="arrow")
        assert arrow.type.list_size == 8
        for wrong in (0, 33, True, "8"):
            with pytest.raises(ConfigurationError, match=r"vectors of 32; give 1 to 32"):
                engine.encode(TEXTS, dimension=wrong)  # type: ignore[call-overload]


def test_prompts_that_cannot_be_meant_are_refused() -> None:
    """A name nobody knows, a name beside words, words for a picture."""
    with fake_engine(dimension=8) as engine:
        with pytest.raises(ConfigurationError, match="'querry' is not known; did you mean 'query'"):
            engine.encode(["a"], prompt_name="querry")
        with pytest.raises(ConfigurationError, match="both a prompt and the name of one"):
            engine.encode(["a"], prompt="x", prompt_name="query")
        plain, prompted = engine.encode(["x a"]), engine.encode(["a"], prompt="x ")
        assert (plain == prompted).all()
    with (
        fake_engine(dimension=8, modality="image") as engine,
        pytest.raises(ConfigurationError, match="a prompt for a model of images"),
    ):
        engine.encode([b"1"], prompt="x")


def test_the_command_takes_prompt_and_dimension(source: Path, tmp_path: Path) -> None:
    """memopt embed writes what encode gives, and goes on only with the same prompt."""
    bundle = convert(source, tmp_path / "bundle")
    (tmp_path / "in.txt").write_text("a cat\nthe dog\n")
    output = tmp_path / "out.npy"
    call = ["embed", str(bundle.path), "-i", str(tmp_path / "in.txt"), "-o", str(output)]
    call += ["--device", "torch", "--dimension", "8"]
    done = CliRunner().invoke(app, [*call, "--prompt-name", "passage"])
    assert done.exit_code == 0, done.output
    with ArrowEngine(open_bundle(bundle.path), device="torch") as engine:
        wanted = engine.encode(["a cat", "the dog"], prompt_name="passage", dimension=8)
    np.testing.assert_allclose(np.load(output), wanted, atol=1e-6)
