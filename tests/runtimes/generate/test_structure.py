"""Answers of a given form: a random model's too, in any batch, cut anywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from memopt import Generator
from memopt.bundle import Bundle
from memopt.cli import app
from memopt.errors import ConfigurationError, InputError

CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6, "pattern": "^[A-Z][a-zé]*$"},
        "size": {"type": "integer", "minimum": 1, "maximum": 999},
        "kind": {"enum": ["town", "port"]},
        "near": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "size", "kind", "near"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(talker: tuple[Bundle, Any]) -> Any:
    with Generator(talker[0], "cpu", "onnx-fp32-fused") as opened:
        yield opened


@settings(max_examples=10)
@given(prompt=st.text(min_size=1, max_size=12), seed=st.integers(0, 99), most=st.integers(1, 90))
def test_an_answer_is_of_its_form_or_told_as_cut(
    engine: Generator, prompt: str, seed: int, most: int
) -> None:
    """What ends with ``stop`` parses and validates; what is cut says ``length``."""
    for temperature in (0.0, 1.5):
        found = engine.generate(
            prompt, schema=CITY, max_new_tokens=most, seed=seed, temperature=temperature
        )[0]
        assert found.finish in ("stop", "length")
        if found.finish == "stop":
            jsonschema.validate(json.loads(found.text), CITY)
        else:
            assert len(found.tokens) == most


def test_every_random_answer_validates(engine: Generator) -> None:
    """With room for the longest one, each draw of a random model is an answer."""
    closed: dict[str, Any] = {"type": "array", "items": {"enum": [1, "a", None]}, "maxItems": 3}
    for seed in range(8):
        found = engine.generate("x", schema=closed, max_new_tokens=110, seed=seed, temperature=1.0)[
            0
        ]
        assert found.finish == "stop"
        jsonschema.validate(json.loads(found.text), closed)


def test_each_row_has_a_form_of_its_own(engine: Generator) -> None:
    """A batch mixes free rows and forms; each is what it is alone."""
    forms = [r"\d{3}-[a-f]+z", None, "(yes|no)"]
    prompts = ["hello", "a", "quick brown"]
    found = engine.generate(prompts, regex=forms, max_new_tokens=20)
    for prompt, form, row in zip(prompts, forms, found, strict=True):
        assert engine.generate(prompt, regex=form, max_new_tokens=20)[0].tokens == row.tokens
        if form is not None and row.finish == "stop":
            assert re.fullmatch(form, row.text)
    assert found[2].text in ("yes", "no")


def test_log_probabilities_are_the_models_own(engine: Generator, talker: Any) -> None:
    """They are of its whole distribution, whatever was ruled out."""
    found = engine.generate("hello", regex="[a-b]{4}")[0]
    ids = engine._tokenizer.encode("hello" + found.text).ids
    with torch.no_grad():
        logits = talker[1](torch.tensor([ids])).logits[0].log_softmax(-1)
    own = [float(logits[4 + place, token]) for place, token in enumerate(found.tokens)]
    np.testing.assert_allclose(found.logprobs, own, atol=1e-4)


def test_a_grammar_in_both_notations(engine: Generator) -> None:
    """Lark's and llama.cpp's: the answer is one of the language."""
    gbnf = 'root ::= "<" inner ">"\ninner ::= "a" | "b" inner\n'
    lark = 'start: "<" inner ">"\ninner: "a" | "b" inner\n'
    for grammar in (gbnf, lark):
        found = engine.generate("x", grammar=grammar, max_new_tokens=60, seed=1, temperature=1.0)[0]
        assert re.fullmatch("<b*a>", found.text)
        assert found.finish == "stop"


def test_a_stop_string_within_a_form_is_a_cut(engine: Generator) -> None:
    """An answer ended by a stop string is told as complete only where it is."""
    inside = engine.generate("x", regex="ab{3}c", stop="bbc", max_new_tokens=9)[0]
    assert (inside.text, inside.finish) == ("ab", "length")
    behind = engine.generate("x", regex="ab(!?)c?", stop="!", max_new_tokens=9, seed=3)
    assert behind[0].finish == "stop"


def test_a_wrong_form_is_one_line(engine: Generator) -> None:
    """What llguidance does not take is said before anything is written."""
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"schema": "{"}, "the schema is no JSON"),
        ({"schema": {"type": "objekt"}}, "the schema cannot be used: Invalid type: objekt"),
        ({"schema": {"not": {}}}, "Unimplemented keys"),
        ({"schema": {"type": "string", "format": "foo"}}, "Unknown format: foo"),
        ({"schema": {1, 2}}, "the schema is no JSON"),
        ({"regex": "(("}, "the regex cannot be used: unclosed group"),
        ({"regex": "(?=a)"}, "look-around"),
        ({"regex": 5}, "the regex is int"),
        ({"grammar": "start: nothing"}, "the grammar cannot be used"),
        ({"regex": "a", "schema": {}}, "schema and regex are given"),
        ({"regex": ["a", "b"]}, "regex has 2 entries for 1 prompts"),
    ]
    for options, said in wrong:
        with pytest.raises(ConfigurationError, match=re.escape(said)) as caught:
            engine.generate("a", **options)
        assert "\n" not in str(caught.value)


def test_an_unknown_option_is_named(engine: Generator) -> None:
    """A typo is refused with what there is."""
    with pytest.raises(ConfigurationError, match="unknown option 'temprature'"):
        engine.generate("a", temprature=1)  # type: ignore[call-arg]


def test_the_command_says_what_was_cut(talker: tuple[Bundle, Any], tmp_path: Path) -> None:
    """An answer of its form is printed; one that was cut is an error, as is a wrong schema."""
    schema = tmp_path / "city.json"
    schema.write_text(json.dumps({"enum": ["yes", "no"]}))
    chosen = ["generate", str(talker[0].path), "a", "--device", "cpu"]
    told = CliRunner().invoke(app, [*chosen, "--schema", str(schema)])
    assert json.loads(told.stdout) in ("yes", "no")
    cut = CliRunner().invoke(app, [*chosen, "--regex", "a{9}", "--max-tokens", "3"])
    assert cut.stdout == "aaa\n"
    assert "was cut after 3 tokens" in str(cut.exception)
    as_json = CliRunner().invoke(app, [*chosen, "--regex", "a{9}", "--max-tokens", "3", "--json"])
    assert json.loads(as_json.stdout)["finish"] == "length"
    schema.write_text("{")
    with pytest.raises(ConfigurationError, match="the schema is no JSON"):
        CliRunner().invoke(app, [*chosen, "--schema", str(schema)], catch_exceptions=False)
    with pytest.raises(InputError, match=r"cannot read .*nowhere"):
        CliRunner().invoke(app, [*chosen, "--grammar", "nowhere"], catch_exceptions=False)
