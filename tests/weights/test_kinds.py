"""Which model types are taken, and what is said of the others before any work is done."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from memopt.errors import WeightsError
from memopt.weights.convert import convert
from memopt.weights.kinds import AUDIO, DUAL, IMAGE, OTHERS, refusal


def _config(folder: Path, model_type: str, **more: object) -> Path:
    folder.mkdir()
    config = {"model_type": model_type, "architectures": ["SomeModel"], **more}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("model_type", "more", "said"),
    [
        ("detr", {}, "a detr, which finds objects in pictures"),
        ("vits", {"vocab_size": 38}, "a vits, which speaks or makes music"),
        ("timesfm", {}, "a timesfm, which forecasts series of numbers"),
        ("bros", {"vocab_size": 99}, "a bros, which needs the place of every word on its page"),
        (
            "llava",
            {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "vit"}},
            "is made of several models (text_config, vision_config)",
        ),
        ("of_tomorrow", {"hidden_size": 8}, "a of_tomorrow, which has no vocabulary"),
    ],
)
@pytest.mark.parametrize("task", [None, "embedding"])
def test_what_has_no_one_vector_is_refused_by_name(
    tmp_path: Path, model_type: str, more: dict[str, object], said: str, task: str | None
) -> None:
    """The config alone decides: the folder has no weights, and no bundle is begun."""
    source = _config(tmp_path / "source", model_type, **more)
    with pytest.raises(WeightsError) as refused:
        convert(source, tmp_path / "bundle", task=task)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "bundle").exists()


def test_parts_of_one_model_are_not_several_models() -> None:
    """MPT's attention has a config of its own, which names no model type."""
    config = {"model_type": "mpt", "vocab_size": 99, "attn_config": {"model_type": ""}}
    assert refusal(config) is None


def test_the_tables_name_model_types_of_transformers_and_each_once() -> None:
    """A misspelt name would be of no model."""
    assert not (IMAGE | AUDIO | DUAL) & set(OTHERS)
    configurations = pytest.importorskip("transformers.models.auto.configuration_auto")
    unknown = (IMAGE | AUDIO | DUAL | set(OTHERS)) - set(configurations.CONFIG_MAPPING_NAMES)
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text()
    if f"transformers=={metadata.version('transformers')}\n" in pins:
        assert not unknown
    else:  # the tables are of the newest; an older one lacks a few
        assert len(unknown) < 10
