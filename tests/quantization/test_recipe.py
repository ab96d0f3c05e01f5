"""Recipes."""

from __future__ import annotations

import inspect
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import pytest

from memopt.bundle import Bundle
from memopt.commands.quantize import quantize
from memopt.errors import ConfigurationError
from memopt.quantization.method import match_layers
from memopt.quantization.recipe import Method, Recipe, known_recipe, load_recipe


def test_round_trip() -> None:
    """A recipe survives plain data, as its own dict and as JSON's lists."""
    recipe = Recipe(
        method="nncf-weights", weight_type="int4", algorithm="awq", keep_float=("*.0.*",)
    )
    assert Recipe.from_dict(asdict(recipe)) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"methd": "static"}, "did you mean 'method'"),
        ({"method": "statik"}, "did you mean 'static'"),
        ({"method": "static", "weight_type": "int4"}, "int8"),
        ({"method": "dynamic", "target": "openvino"}, "cpu"),
        ({"method": "dynamic", "algorithm": "gptq"}, "rtn"),
        ({"method": "static", "symmetric": False}, "symmetric"),
        ({"method": "static", "granularity": "per-group"}, "per-channel"),
        ({"method": "weight-only", "group_size": 24}, "power of two"),
        ({"group_size": -1}, "negative"),
        ({"group_size": True}, "group_size"),
        ({"smooth": 1.5}, "[0, 1]"),
        ({"smooth": "fast"}, "auto"),
        ({"percentile": 5}, "99.9"),
        ({"range_margin": 0.5}, "1.0 to 1.5"),
        ({"max_drop": -0.1}, "negative"),
        ({"keep_float": [1]}, "keep_float"),
        ({"symmetric": "yes"}, "symmetric"),
    ],
)
def test_bad_values(values: dict[str, object], says: str) -> None:
    """A bad value is one error that names the way out."""
    with pytest.raises(ConfigurationError) as caught:
        Recipe.from_dict(values)
    assert says in str(caught.value)


@pytest.mark.parametrize("method", get_args(Method))
def test_a_methods_own_settings_are_strict(method: Any) -> None:
    """They come out of a recipe and out of plain data alike; what is not theirs is refused."""
    own = Recipe(method=method, keep_float=("*.0.*",)).own
    assert type(own).from_dict(asdict(own)) == own
    assert {field.name for field in fields(own)} < {field.name for field in fields(Recipe)}
    for field in fields(own):
        assert field.default == getattr(Recipe(), field.name)
    with pytest.raises(ConfigurationError, match="did you mean 'weight_type'"):
        type(own).from_dict({"weight_typ": "int8"})
    with pytest.raises(ConfigurationError, match="weight_type 'int1' does not go with method"):
        type(own).from_dict({"weight_type": "int1"})


def test_yaml(tmp_path: Path) -> None:
    """A recipe is read from YAML, bare or under ``quantize:`` as in models/*.yaml."""
    bare, nested = tmp_path / "a.yaml", tmp_path / "b.yaml"
    bare.write_text("method: weight-only\nweight_type: int4\nkeep_float: '*pooler*'\n")
    nested.write_text(
        "source: x\nquantize:\n  method: weight-only\n  weight_type: int4\n"
        "  keep_float: ['*pooler*']\n"
    )
    assert load_recipe(bare) == load_recipe(nested)
    assert load_recipe(bare).variant_name == "onnx-int4-weight-only"


def test_a_known_model_brings_its_recipe(
    tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``quantize:`` of models/*.yaml holds for a bundle of that name or source, and no other."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    entry = tmp_path / "models" / "other.yaml"
    entry.write_text(f"source: {tiny.manifest.source}\nquantize:\n  method: dynamic\n")
    assert known_recipe(tiny) == {"method": "dynamic"}
    entry.write_text("source: somebody/else\nquantize:\n  method: dynamic\n")
    assert known_recipe(tiny) == {}
    entry.rename(entry.with_name(f"{tiny.manifest.name}.yaml"))
    assert known_recipe(tiny) == {"method": "dynamic"}
    entry.with_name(f"{tiny.manifest.name}.yaml").write_text("source: x/y\nquantize: int8\n")
    with pytest.raises(ConfigurationError, match="quantize is 'int8', not a recipe"):
        known_recipe(tiny)


def test_every_shipped_model_has_a_recipe_that_is_one() -> None:
    """The recipes of models/*.yaml are read without complaint, and the entry by convert too."""
    files = sorted((Path(__file__).parents[2] / "models").glob("*.yaml"))
    assert len(files) >= 3
    for file in files:
        assert load_recipe(file).method == "static"


@pytest.mark.parametrize("text", ["[1, 2]", "a: b: c", ""])
def test_bad_yaml(tmp_path: Path, text: str) -> None:
    """What is no recipe is refused by the file's name."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"r\.yaml"):
        load_recipe(path)


def test_every_field_is_a_flag_with_its_default() -> None:
    """``memopt quantize --help`` shows every field of Recipe and the default it has."""
    parameters = inspect.signature(quantize).parameters
    recipe = Recipe()
    for field in fields(Recipe):
        assert field.metadata["help"]
        option = parameters[field.name].annotation
        default = getattr(recipe, field.name)
        if isinstance(default, bool):
            shown = field.name.replace("_", "-") if default else f"no-{field.name}"
        else:
            words = {"group_size": "64 for int8, else 32", "max_drop": "0, off"}
            shown = words.get(field.name, str(default) if default != () else "none")
        assert f"[default: {shown}]" in option.__metadata__[0].help, field.name


def test_unknown_pattern_names_the_nearest() -> None:
    """A pattern that matches nothing is an error that lists the nearest layers."""
    names = [f"embeddings.{part}_embeddings.weight" for part in ("position", "token", "word")]
    names += ["encoder.layer.0.attention.self.query.weight", "pooler.dense.weight"]
    with pytest.raises(
        ConfigurationError, match=r"no layer matches '\*\.qery\.\*'.*nearest: [\w.]*query"
    ):
        match_layers(["*.qery.*"], names)
