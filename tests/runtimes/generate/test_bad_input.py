"""What is no prompt, no option, no conversation or no tokenizer is one line, never a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from typer.testing import CliRunner

from memopt import Generator
from memopt.bundle import Bundle
from memopt.cli import app
from memopt.errors import BundleError, ConfigurationError, InputError
from memopt.runtimes.audio import waveform
from memopt.runtimes.generate.chat import check, prompt_of
from memopt.runtimes.generate.request import Request
from memopt.runtimes.generate.sampling import Sampler, Sampling
from memopt.runtimes.generate.words import end_tokens

Talker = tuple[Bundle, Any]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", float("inf")),
        ("top_k", 2.5),
        ("top_k", "3"),
        ("top_p", None),
        ("min_p", "x"),
        ("repetition_penalty", True),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("seed", "x"),
        ("seed", 1.5),
        ("stop", 5),
        ("stop", None),
        ("stop", [5]),
        ("stop", b"x"),
        ("max_new_tokens", True),
        ("exact", "no"),
    ],
)
def test_an_option_of_the_wrong_kind_is_named(name: str, value: object) -> None:
    """Numbers as text, fractions of tokens, nothing: the name, the value and what to give."""
    with pytest.raises(ConfigurationError, match=f"{name} is .*; give "):
        Request.of({name: value})


def test_numbers_of_numpy_are_numbers() -> None:
    """What is read from an array may be given on."""
    found = Request.of({"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.int32(1)})
    assert found.sampling.top_k == 3


def test_the_coldest_draw_is_the_likeliest_token() -> None:
    """A temperature near nothing, whose division overflows, takes what 0 takes."""
    logits = np.float32([1, 5, 2])
    assert Sampler(Sampling(temperature=1e-320, seed=0)).pick(logits, [])[0] == 1


@pytest.mark.parametrize(
    "messages",
    [
        None,
        5,
        "hi",
        ["hi"],
        {"role": "user", "content": "x"},
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any) -> None:
    """Nothing that is no text gets into a prompt as Python prints it."""
    with pytest.raises(InputError):
        check(messages)


def test_files_that_are_broken_are_named(tmp_path: Path) -> None:
    """A template that is no UTF-8, a config that is no JSON, an end that is no token."""
    said = [{"role": "user", "content": "x"}]
    (tmp_path / "tokenizer_config.json").write_text('{"chat')
    with pytest.raises(BundleError, match=r"tokenizer_config\.json"):
        prompt_of(tmp_path, said, {})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BundleError, match="no UTF-8"):
        prompt_of(tmp_path, said, {})
    (tmp_path / "config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(BundleError, match="eos_token_id is 'x'"):
        end_tokens(tmp_path)


@pytest.mark.parametrize("rate", [0.5, 999_999_937, float("inf")])
def test_a_rate_that_none_has_is_refused_before_memory_is_taken(rate: float) -> None:
    """A header may say four billion samples a second."""
    with pytest.raises(ValueError, match="are no rate"):
        waveform((np.ones(9, np.float32), rate), 16_000)


def test_prompts_that_are_none(talker: Talker) -> None:
    """Wrong types, half characters and no prompt at all."""
    with Generator(talker[0], "cpu", "onnx-fp32-fused") as engine:
        assert engine.generate([]) == []
        for prompts, said in ((None, "NoneType"), (5, "int"), ("a\ud800", "'.ud800'")):
            with pytest.raises(InputError, match=said):
                engine.generate(prompts)  # type: ignore[arg-type]
        for messages in ("hi", ["hi"], None):
            with pytest.raises(InputError):
                engine.chat(messages)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="cancel is bool"):
            engine.generate("a", cancel=True)  # type: ignore[arg-type]


def test_what_begins_a_text_stands_there_once(talker: Talker, tmp_path: Path) -> None:
    """A template and a tokenizer that both write it: a chat is read as transformers reads it."""
    folder = tmp_path / "bundle"
    shutil.copytree(talker[0].path, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    first = tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", first)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told |= {"bos_token": "<end>", "chat_template": "{{ bos_token }}" + told["chat_template"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    with Generator(folder, "cpu", "onnx-fp32-fused", verify="never") as engine:
        reply = engine.chat([{"role": "user", "content": "x"}], max_new_tokens=2)
        assert reply.prompt_tokens == 1 + len("<user>x<assistant>")
        assert engine.generate("x", max_new_tokens=2)[0].prompt_tokens == 2
    (folder / "tokenizer.json").write_text('{"a": 1}')
    with (
        Generator(folder, "cpu", "onnx-fp32-fused", verify="never") as engine,
        pytest.raises(BundleError, match="is no tokenizer"),
    ):
        engine.generate("x")


def test_a_cut_form_is_an_error_in_json_too(talker: Talker) -> None:
    """The line is printed, with `length`, and the command fails as it does without --json."""
    command = ["generate", str(talker[0].path), "a", "--device", "cpu", "--max-tokens", "3"]
    found = CliRunner().invoke(app, [*command, "--regex", "[a-z]{50}", "--json"])
    assert json.loads(found.stdout)["finish"] == "length"
    assert isinstance(found.exception, InputError)
