"""Checkpoints that transformers renames, splits or joins while loading give the same model here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from memopt.errors import ExportError
from memopt.runtimes import conversions
from memopt.runtimes.torch_model import load_model
from memopt.weights.convert import convert
from memopt.weights.reader import WeightLoader

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.15,
}
FUSED = ("NomicBert", "JinaEmbeddingsV3", "Gte")


@pytest.mark.parametrize("name", FUSED)
def test_fused_query_key_and_value_are_split_as_transformers_splits_them(
    name: str, tiny_source: Path, tmp_path: Path
) -> None:
    """The hidden states are bit for bit those of AutoModel; the bundle keeps the file's names."""
    if not hasattr(transformers, f"{name}Model"):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SIZES)
    folder = tmp_path / name
    getattr(transformers, f"{name}Model")(config).eval().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_source / file, folder / file)
    bundle = convert(folder, tmp_path / "bundle")
    with WeightLoader(bundle.weights) as loader:
        assert any("qkv" in stored.lower() for stored in loader.names())
    module = load_model(bundle, "embedding").module
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        wanted, got = model(ids).last_hidden_state, module(ids).last_hidden_state
    np.testing.assert_array_equal(got.numpy(), wanted.numpy())


class _Step:
    """A step that fails, as a checkpoint of other sizes makes one fail."""

    def rename_source_key(self, name: str) -> tuple[str, str | None]:
        return (name, "weight") if name.endswith("weight") else (name, None)

    def add_tensor(self, *arguments: Any) -> None:
        pass

    def convert(self, name: str, **arguments: Any) -> Any:
        raise ValueError("cannot be split into 3")


def test_a_step_that_fails_names_the_weights(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which weights transformers could not convert, and why."""
    monkeypatch.setattr(conversions, "_steps", lambda module: ([], [_Step()]))
    with pytest.raises(ExportError, match=r"convert the weights .*weight.*cannot be split into 3"):
        load_model(tiny, "embedding")


def test_a_transformers_without_its_private_modules_still_loads_current_names(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they moved, a checkpoint in today's names needs no step."""
    monkeypatch.setitem(__import__("sys").modules, "transformers.conversion_mapping", None)
    assert load_model(tiny, "embedding").names
