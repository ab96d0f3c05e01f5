"""A GGUF file of each architecture gives the model that it was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from memopt.runtimes.torch_model import load_model
from memopt.weights.convert import convert
from tests.weights.gguf.kit import CASES, TOKENS, Case, make_model, write_case

IDS = torch.tensor(np.random.default_rng(5).integers(3, len(TOKENS), (2, 21)))


def logits(module: Any) -> np.ndarray:
    """Return a model's logits of the same tokens."""
    with torch.no_grad():
        return module(IDS).logits.numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bundle_answers_as_the_model_that_was_written(case: Case, tmp_path: Path) -> None:
    """Names, moved rows, norms and rotary positions are undone: the logits are the model's own."""
    model = make_model(case)
    file = write_case(tmp_path / "model.gguf", case, model)
    bundle = convert(file, tmp_path / "bundle")
    loaded = load_model(bundle, "text-generation")
    np.testing.assert_allclose(logits(loaded.module), logits(model), atol=2e-5)
    assert bundle.manifest.task == "text-generation"
    if case.peer:
        peer = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=file.name, attn_implementation="eager"
        )
        np.testing.assert_allclose(logits(loaded.module), logits(peer.eval()), atol=2e-5)
