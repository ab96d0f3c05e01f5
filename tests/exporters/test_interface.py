"""Heads pool what the mask keeps, on either padding side, whatever the pooling."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from memopt.bundle import Bundle
from memopt.exporters import examples, interface
from memopt.runtimes.heads import TaskHead, head_outputs
from memopt.runtimes.torch_model import load_model

HIDDEN = np.random.default_rng(3).normal(size=(3, 6, 4)).astype(np.float32) - 5.0
LEFT = np.array([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])


def _pooled(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    result = SimpleNamespace(last_hidden_state=hidden)
    return head_outputs(TaskHead(pooling=pooling), result, mask)[-1]


@pytest.mark.parametrize("mask", [LEFT, LEFT[:, ::-1].copy()], ids=["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_pooling_sees_only_kept_tokens(pooling: str, mask: np.ndarray) -> None:
    """Each pooling equals a plain loop over the kept tokens of each row."""
    hidden = torch.from_numpy(HIDDEN)
    got = _pooled(hidden, torch.from_numpy(mask), pooling).numpy()
    for row, (tokens, keep) in enumerate(zip(HIDDEN, mask.astype(bool), strict=True)):
        kept = tokens[keep]
        wanted = {"mean": kept.mean(0), "max": kept.max(0), "cls": kept[0], "last": kept[-1]}
        np.testing.assert_allclose(got[row], wanted[pooling], rtol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_a_row_of_padding_only_pools_to_finite_numbers(pooling: str) -> None:
    """Nothing is divided by a count of zero."""
    mask = torch.zeros((3, 6), dtype=torch.int64)
    got = _pooled(torch.from_numpy(HIDDEN), mask, pooling)
    assert torch.isfinite(got).all()


def test_example_inputs_are_realistic_and_separate(tiny: Bundle) -> None:
    """Padding where the shape says so, the padding id below it, one array per input."""
    loaded = load_model(tiny, "embedding")
    names = interface.signature(loaded, tiny.manifest, "embedding").inputs
    right = examples.example(loaded, names, examples.Shape(4, 9, "right"), seed=1)
    left = examples.example(loaded, names, examples.Shape(4, 9, "left"), seed=1)
    assert right["attention_mask"][0].all()
    assert not right["attention_mask"][1:, -1].any()
    assert right["attention_mask"][:, 0].all()
    assert not left["attention_mask"][1:, 0].any()
    assert (right["input_ids"][right["attention_mask"] == 0] == 0).all()
    assert (right["input_ids"][right["attention_mask"] == 1] != 0).all()
    assert len({id(value) for value in right.values()}) == len(names)
    again = examples.example(loaded, names, examples.Shape(4, 9, "right"), seed=1)
    assert all((again[name] == right[name]).all() for name in names)


def test_every_text_model_is_checked_on_short_long_and_both_padding_sides(tiny: Bundle) -> None:
    """One token, the longest sequence, and padding left and right are among the shapes."""
    loaded = load_model(tiny, "embedding")
    shapes = examples.check_shapes(loaded, "embedding", tiny.manifest.max_length)
    assert examples.Shape(1, 1) in shapes
    assert {shape.padding for shape in shapes} == {"", "left", "right"}
    assert max(shape.length for shape in shapes) >= 60
    assert len(shapes) >= 4


def test_the_graph_and_the_reference_pool_alike_but_are_written_apart(tiny: Bundle) -> None:
    """Wrapped model and numpy reference agree for every pooling, with and without normalise."""
    loaded = load_model(tiny, "embedding")
    for pooling in ("mean", "cls", "max", "last", "model"):
        for normalize in (True, False):
            manifest = dataclasses.replace(tiny.manifest, pooling=pooling, normalize=normalize)
            loaded = dataclasses.replace(loaded, head=TaskHead("embedding", pooling, normalize))
            names = interface.signature(loaded, manifest, "embedding").inputs
            feeds = examples.example(loaded, names, examples.Shape(3, 8, "right"), seed=2)
            wanted = interface.reference(loaded, manifest, "embedding", feeds)
            module = interface.wrap(loaded, manifest, "embedding")
            with torch.no_grad():
                _, pooled = module(*(torch.from_numpy(feeds[name]) for name in names))
            np.testing.assert_allclose(pooled, wanted["sentence_embedding"], atol=1e-5)


def test_a_prompt_is_not_pooled_and_the_vector_is_cut(tiny: Bundle) -> None:
    """The graph's head and the reference leave out the same tokens and values."""
    loaded = load_model(tiny, "embedding")
    head = dataclasses.replace(loaded.head, include_prompt=False, keep=5)
    loaded = dataclasses.replace(loaded, head=head)
    names = interface.signature(loaded, tiny.manifest, "embedding").inputs
    assert names[-1] == "pooling_mask"
    for pooling in ("mean", "cls", "max", "last"):
        manifest = dataclasses.replace(tiny.manifest, pooling=pooling)
        loaded = dataclasses.replace(loaded, head=dataclasses.replace(loaded.head, pooling=pooling))
        for side in ("left", "right"):
            feeds = examples.example(loaded, names, examples.Shape(3, 9, side), seed=2)
            left = feeds["attention_mask"].sum(1) - feeds["pooling_mask"].sum(1)
            assert left.tolist() == [1, 2, 3]
            wanted = interface.reference(loaded, manifest, "embedding", feeds)["sentence_embedding"]
            assert wanted.shape == (3, 5)
            module = interface.wrap(loaded, manifest, "embedding")
            with torch.no_grad():
                _, pooled = module(*(torch.from_numpy(feeds[name]) for name in names))
            np.testing.assert_allclose(pooled, wanted, atol=1e-5)


def test_a_model_without_segments_has_no_input_for_them(tiny: Bundle, tmp_path: Path) -> None:
    """token_type_ids is an input only where the table has more than one row."""
    from memopt.bundle import open_bundle

    folder = shutil.copytree(tiny.path, tmp_path / "bundle")
    config = json.loads((folder / "config.json").read_text())
    bundle = open_bundle(folder)
    loaded = load_model(bundle, "embedding")
    assert "token_type_ids" in interface.signature(loaded, bundle.manifest, "embedding").inputs
    loaded.config.type_vocab_size = 1
    assert config["type_vocab_size"] == 2
    assert "token_type_ids" not in interface.signature(loaded, bundle.manifest, "embedding").inputs
