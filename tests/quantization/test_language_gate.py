"""The gate of language models: what is measured, and that it is right."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memopt.bundle import Bundle, open_bundle
from memopt.errors import QuantizationError
from memopt.graphs.session import open_whole
from memopt.quantization.accuracy.calibration import CalibrationSet
from memopt.quantization.accuracy.gate import Gate
from memopt.quantization.accuracy.language import (
    NEW,
    LanguageValidator,
    compare_tokens,
    written,
)
from memopt.quantization.accuracy.report import render
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe
from tests.quantization.conftest import sentences
from tests.runtimes.generate.kit import greedy

INT4 = Recipe(method="weight-only", weight_type="int4", symmetric=False)
LOOSE = Gate(bounds={"kl_mean": 10.0, "perplexity_increase": 10.0})


def _logits(random: np.random.Generator, tokens: int) -> np.ndarray:
    return random.normal(0, 4, (tokens, 50)).astype(np.float32)


@pytest.mark.parametrize("tokens", [2, 64, 65, 200])
def test_the_numbers_of_a_token_are_those_of_torch(tokens: int) -> None:
    """Divergence, agreement and likelihood of any number of tokens, as torch computes them."""
    random = np.random.default_rng(tokens)
    exact, got = _logits(random, tokens), _logits(random, tokens)
    ids = random.integers(0, 50, tokens)
    found = compare_tokens(exact, got, ids)
    a, b = (torch.from_numpy(x[:-1]).double().log_softmax(-1) for x in (exact, got))
    kl = torch.nn.functional.kl_div(b, a, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found.kl, kl.numpy(), rtol=1e-5)
    following = torch.from_numpy(ids[1:])[:, None]
    np.testing.assert_allclose(found.exact, -a.gather(1, following)[:, 0].numpy(), rtol=1e-5)
    np.testing.assert_allclose(found.got, -b.gather(1, following)[:, 0].numpy(), rtol=1e-5)
    np.testing.assert_array_equal(found.same, (a.argmax(-1) == b.argmax(-1)).numpy())


def test_a_text_of_one_token_tells_nothing() -> None:
    """Where nothing follows there are no numbers, and no error."""
    assert not len(compare_tokens(np.zeros((1, 5), np.float32), np.zeros((1, 5)), np.array([1])).kl)


@pytest.mark.parametrize("name", ["onnx-fp32", "onnx-fp32-fused", "openvino-fp32"])
def test_texts_in_one_padded_batch_are_those_of_transformers(
    talker: tuple[Bundle, Any], name: str
) -> None:
    """Every graph, with its cache, writes behind prompts of several lengths what torch writes."""
    bundle, model = talker
    variant = bundle.variant(name)
    run = open_whole(bundle.file(variant), variant.format, variant.options)
    prompts = [[40, 41, 42, 43, 44], [7], [99, 98, 97]]
    texts = written(run, variant.output, prompts, 12)
    for prompt, text in zip(prompts, texts, strict=True):
        wanted = greedy(model, prompt, 12)
        assert text[: len(wanted)] == wanted


@pytest.mark.parametrize("name", ["onnx-fp32-fused", "openvino-fp32"])
def test_the_float_graph_is_equal_to_itself(talker: tuple[Bundle, Any], name: str) -> None:
    """No divergence, every token the same, every text written to its end."""
    bundle, _ = talker
    variant, data = bundle.variant(name), CalibrationSet(items=tuple(sentences(6)), modality="text")
    validator = LanguageValidator(bundle, variant, data, max_length=40)
    again = validator.open(bundle.file(variant), variant.format, variant.options)
    found = validator.validate(again)
    assert found.measures["kl_mean"] < 1e-6
    assert found.measures["top1_agreement"] == 1
    assert found.measures["greedy_prefix"] == NEW
    assert found.perplexity == pytest.approx(validator.float_perplexity)
    assert all(ours == theirs for _, ours, theirs in found.texts)
    assert not found.failures(Gate())


@pytest.fixture
def samples(texts: Path) -> Samples:
    return Samples(calibration=texts, samples=12, validation_samples=10, max_length=40)


def test_what_misses_is_not_written_and_bounds_are_the_callers(
    talker: tuple[Bundle, Any], samples: Samples, tmp_path: Path
) -> None:
    """Int4 of random weights misses KL by default; with other bounds it is written, with proof."""
    shutil.copytree(talker[0].path, tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    with pytest.raises(QuantizationError, match=r"KL to the float model.* misses 0\.05"):
        quantize(bundle, samples, INT4)
    assert INT4.variant_name not in open_bundle(bundle.path).manifest.variants
    result = quantize(bundle, samples, INT4, gate=LOOSE)
    made = result.validation
    assert result.passed
    assert {"kl_mean", "kl_p99", "top1_agreement", "greedy_prefix"} <= set(made.measures)
    assert made.measures["kl_mean"] < made.measures["kl_p99"]
    rows = {label: bound for label, _, bound in made.rows(LOOSE)}
    assert rows["KL to the float model, nats a token, mean"] == "at most 10"
    assert rows["perplexity increase"] == "at most 1000%"
    recorded = open_bundle(bundle.path).variant(result.name).validation or {}
    assert recorded["kl_mean"] == pytest.approx(made.measures["kl_mean"], abs=1e-6)
    assert "texts" not in recorded
    _agrees(bundle, result.variant.name, result.validation.texts)
    page = render(result)
    assert "What they write" in page
    assert result.to_dict()["validation"]["texts"] == made.texts


def _agrees(bundle: Bundle, name: str, texts: tuple[tuple[str, str, str], ...]) -> None:
    """Compare the texts of a report with those of the engine."""
    from memopt import Generator

    assert texts
    for variant, column in (("onnx-fp32-fused", 1), (name, 2)):
        with Generator(bundle.path, "cpu", variant, strict=True) as engine:
            prompts = [text[0] for text in texts]
            for prompt, text in zip(prompts, texts, strict=True):
                wanted = engine.generate(prompt, max_new_tokens=NEW)[0].text
                # The engine gives out no part of a character.
                assert text[column].rstrip("\ufffd") == wanted.rstrip("\ufffd")


def test_the_equal_beginning_is_counted_as_it_is_written(
    talker: tuple[Bundle, Any], samples: Samples, tmp_path: Path
) -> None:
    """The count that reading the float's text gives is that of two texts written apart."""
    shutil.copytree(talker[0].path, tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    recipe = Recipe(method="weight-only", weight_type="int8", group_size=32)
    made = quantize(bundle, samples, recipe, gate=LOOSE).variant
    data = CalibrationSet(items=tuple(sentences(5)), modality="text")
    base = bundle.variant("onnx-fp32-fused")
    validator = LanguageValidator(bundle, base, data, max_length=40)
    runs = [validator.open(bundle.path / v.file, v.format, v.options) for v in (base, made)]
    prompts = [p.ids for p in validator._prompts]
    left, right = (written(run, "logits", prompts, NEW) for run in runs)
    equal = [
        next((n for n, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), NEW)
        for x, y in zip(left, right, strict=True)
    ]
    ends = [any(t in validator._ends for t in x[:n]) for x, n in zip(left, equal, strict=True)]
    wanted = [NEW if ended else n for ended, n in zip(ends, equal, strict=True)]
    assert validator._equal(runs[1]) == wanted
