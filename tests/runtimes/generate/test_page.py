"""docs/language.md runs as it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from memopt.bundle import Bundle

PAGE = Path(__file__).parents[3] / "docs" / "language.md"


def test_the_python_of_the_page_runs(
    talker: tuple[Bundle, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each block about texts, one after another, on a bundle under models/."""
    found = re.findall(r"(?m)(?:^    .*\n(?:\n(?=    ))*)+", PAGE.read_text(encoding="utf-8"))
    # What is heard needs a model of its own: engines/test_transcriber.py has it.
    python = [block for block in found if not block.startswith("    memopt ")]
    blocks = [dedent(block) for block in python if "Transcriber" not in block]
    assert len(blocks) >= 2
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2").symlink_to(talker[0].path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["reply"].finish in ("stop", "length")
    if names["answer"].finish == "stop":
        assert set(json.loads(names["answer"].text)) == {"name", "age"}
    assert names["answer"].text in capsys.readouterr().out
