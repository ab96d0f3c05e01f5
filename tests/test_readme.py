"""README's Python example runs as written, and every path and command it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from memopt.bundle import Bundle
from memopt.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_as_written(
    minilm: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The block finds the built bundle under models/ and prints the sentence about the cat."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "minilm").symlink_to(minilm.path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 1
    assert len(blocks[0].strip().splitlines()) <= 12
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "A cat sleeps on the warm keyboard." in capsys.readouterr().out


def test_every_named_file_and_command_exists() -> None:
    """A reproduction command in the README points at a script that is there."""
    for script in re.findall(r"(?:benchmarks|examples|docs)/[\w./-]+\.\w+", README):
        assert (ROOT / script).is_file(), script
    for command in re.findall(r"(?m)^\s+memopt ([a-z]+)", README):
        assert command in COMMANDS
