"""The speed of language models, on the tiny one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from memopt.benchmark.writing import Typist, bench_writing, measure_writers
from memopt.bundle import Bundle
from memopt.cli import app
from memopt.errors import ConfigurationError, DeviceError, InputError


def test_bench_of_a_language_model_says_how_fast_it_reads_and_writes(
    talker: tuple[Bundle, Any],
) -> None:
    """memopt bench gives prefill and decode rates, time to first token and memory of each."""
    names = ["onnx-fp32-fused", "openvino-fp32"]
    flags = [part for name in names for part in ("--variant", name)]
    command = ["bench", str(talker[0].path), *flags, "--rounds", "1", "--json"]
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 0, answer.output
    records = json.loads(answer.stdout)["records"]
    assert [record["variant"] for record in records] == names
    for record in records:
        assert record["prompt_tokens"] > 32
        assert record["new_tokens"] > 0
        assert record["prefill_tokens_per_second"] > 0
        assert record["decode_tokens_per_second"] > 0
        assert record["first_token_seconds"] > 0
        assert record["rss_mb"] > 20


def test_what_cannot_run_is_told_and_the_others_go_on(talker: tuple[Bundle, Any]) -> None:
    """A contender on a provider that has no such graph is named; the next one is measured."""
    writers = [Typist("openvino-fp32", "cpu"), Typist("onnx-fp32", "cpu", threads=1)]
    failures: dict[int, str] = {}
    found = measure_writers(talker[0], writers, rounds=1, failures=failures)
    assert list(failures) == [0]
    assert "openvino-fp32" in failures[0]
    assert [record.label for record in found] == ["onnx-fp32 x1"]
    with pytest.raises(DeviceError, match="openvino-fp32"):
        measure_writers(talker[0], writers[:1], rounds=1)


def test_prompts_that_are_none(talker: tuple[Bundle, Any], tmp_path: Path) -> None:
    """A file that is missing or empty is one line; so is a page that a model's speed has not."""
    (tmp_path / "empty.txt").write_text(" \n")
    for name, words in (("none.txt", "cannot be read"), ("empty.txt", "is empty")):
        with pytest.raises(InputError, match=words):
            bench_writing(talker[0].path, variants=["auto"], text=tmp_path / name)
    command = ["bench", str(talker[0].path), "--peers", "fastembed"]
    answer = CliRunner().invoke(app, command)
    assert isinstance(answer.exception, ConfigurationError)
