"""memopt tag, answer and fill, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from memopt.bundle import Bundle
from memopt.cli import app
from memopt.errors import MemoptError
from memopt.runtimes.engines.filler import MaskFiller
from memopt.runtimes.engines.tagger import TokenClassifier
from tests.runtimes.engines import kit


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("tokens")
    return {task: kit.bundle(folder / task, "bytes", task) for task in ("tag", "answer", "fill")}


def run(*arguments: object, stdin: str = "") -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def test_tag_answers_lines_of_stdin_as_json(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """One line an input, an empty one too; the same as a file, and as the engine's own."""
    path, texts = bundles["tag"].path, [kit.SHORT[0], "", kit.LONG[0]]
    common = ("tag", path, "--device", "torch", "--aggregation", "first", "-i", "-")
    done = run(*common, "--json", stdin="\n".join(texts))
    assert done.exit_code == 0, done.exception
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    with TokenClassifier(path, device="torch") as engine:
        found = engine.tag(texts, "first")
    assert [[s["text"] for s in row["spans"]] for row in rows] == [
        [span.text for span in spans] for spans in found
    ]
    output = tmp_path / "out.jsonl"
    assert run(*common, "-o", output, stdin="\n".join(texts)).exit_code == 0
    assert [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] == rows


def test_answer_shows_a_table(bundles: dict[str, Bundle]) -> None:
    """The part of the text, its characters and its score."""
    path = bundles["answer"].path
    done = run("answer", path, "--device", "torch", "-q", "Where?", "Rome is old.", "--top", 2)
    assert done.exit_code == 0, done.exception
    assert "characters" in done.stdout
    assert done.stdout.count("Rome is old.") >= 2


def test_fill_names_the_text_without_a_mask(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """By its place in the whole file, in one line, and no half-written output is left."""
    path, output = bundles["fill"].path, tmp_path / "out.jsonl"
    lines = ["a <mask>"] * 600
    common = ("fill", path, "--device", "torch", "--top", 1, "-i", "-", "-o", output)
    lines[555] = "a gap"
    done = run(*common, stdin="\n".join(lines))
    assert isinstance(done.exception, MemoptError)
    assert str(done.exception) == "input 555 holds no mask; write <mask> where a word is left"
    assert list(tmp_path.iterdir()) == []
    done = run("fill", path, "--device", "torch", "--json", "--top", 2, "in <mask>, <mask>")
    assert done.exit_code == 0, done.exception
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    with MaskFiller(path, device="torch") as engine:
        (masks,) = engine.fill("in <mask>, <mask>", 2)
    assert [tuple(mask["ids"]) for mask in row["masks"]] == [mask.ids for mask in masks]


def test_wrong_usage_is_one_line(bundles: dict[str, Bundle]) -> None:
    """Another task's bundle, an unknown aggregation, nothing to answer."""
    path = bundles["tag"].path
    for arguments, code, text in (
        (("fill", path, "a"), 1, "run: memopt tag"),
        (("tag", path, "--device", "torch", "a", "--aggregation", "no"), 2, "mean 'none'"),
        (("tag", path, "--device", "torch"), 2, "nothing to answer"),
        (("answer", bundles["answer"].path, "--device", "torch", "-q", "Who?", " "), 1, "empty"),
    ):
        done = run(*arguments)
        assert isinstance(done.exception, MemoptError)
        assert (done.exception.exit_code, done.stdout) == (code, "")
        assert text in str(done.exception)
