"""What others wrote never commands the terminal of who reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import memopt.commands
from memopt.commands.console import echo, stderr, stdout
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.session import open_memory
from memopt.visible import json_text, visible

HOSTILE = "red\x1b]0;title\x07\x1b[2J\x9b5m\r\x7f\x08\u202edoor\u2066\u200b\ufeff"
ASKED = {ord(c) for c in HOSTILE if not c.isalnum() and c not in "];[ "}


def obeyed(shown: str) -> set[str]:
    """Return what a terminal would obey, or hide, of an output."""
    return {c for c in shown if (ord(c) < 32 and c not in "\n\t") or ord(c) in ASKED}


def command(*arguments: object) -> tuple[int, str]:
    """Run memopt; return its exit code and all it printed."""
    line = [sys.executable, "-m", "memopt", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, check=False)
    return done.returncode, (done.stdout + done.stderr).decode()


def test_every_character_in_question_becomes_its_escape() -> None:
    shown = visible("".join(map(chr, range(0x20))) + HOSTILE + "\ud800\U000e0041")
    assert obeyed(shown) == set()
    assert "\\x1b[2J" in shown
    assert "\\x9b5m" in shown
    assert "\\u202edoor" in shown
    shown.encode()
    kept = "Tür\tmit\nGriff 門 👩\u200d👧 می\u200cخواهم"
    assert visible(kept) == kept


def test_json_says_the_same_in_escapes() -> None:
    document = {"text": HOSTILE + "Tür\ud800\U000e0041", "a\u202e": [1]}
    text = json_text(document)
    assert obeyed(text) == set()
    assert "Tür" in text
    assert json.loads(text) == document


def test_texts_cells_titles_and_bars_of_a_console_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.progress import Progress, TextColumn
    from rich.table import Table
    from rich.text import Text

    table = Table(HOSTILE, "b", title=HOSTILE)
    table.add_row(HOSTILE, Text(HOSTILE))
    for console in (stdout(), stderr()):
        console.print(table)
        console.print(HOSTILE, Text(HOSTILE))
        with Progress(TextColumn("{task.description}"), console=console) as bar:
            bar.add_task(HOSTILE)
    echo(HOSTILE)
    echo(HOSTILE, err=True)
    done = capsys.readouterr()
    for shown in (done.out, done.err):
        assert "\\x1b[2J" in shown
        assert obeyed(shown) == set()
    # The borders of a table stay in line with what is shown, not with what was given.
    rows = [line for line in done.out.splitlines() if line.startswith(("│", "┃"))]
    assert len({len(line) for line in rows}) == 1


def test_commands_show_a_hostile_memory_and_a_hostile_name(tmp_path: Path) -> None:
    place = tmp_path / "store"
    with open_memory(place, embed=False) as memory:
        new = NewMemory(
            content=Content(text=HOSTILE), embedding=np.ones(768), category="a\x1b[5m\u202e"
        )
        key = memory.store.add(new).ids[0]
    for arguments in (
        ("show", place, key),
        ("show", place, key, "--json"),
        ("stats", place),
        ("stats", place, "--json"),
        ("show", place, "no\x1b[2Jid"),
    ):
        _, shown = command("memory", *arguments)
        assert "\\x1b" in shown or "\\u001b" in shown, arguments
        assert obeyed(shown) == set(), arguments
    code, shown = command("--debug", "info", tmp_path / "no\x1b[2Jbundle")
    assert code
    assert "\\x1b[2J" in shown
    assert obeyed(shown) == set()


def test_a_warning_of_the_library_is_shown_too(tmp_path: Path) -> None:
    code = (
        "import logging, memopt.cli, sys; sys.argv = ['memopt', '--version']\n"
        "try: memopt.cli.main()\n"
        "except SystemExit: pass\n"
        "logging.getLogger('memopt').warning('node %s', 'a\\x1b[2J')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "node a\\x1b[2J\n"


def test_no_command_prints_past_the_console() -> None:
    folder = Path(memopt.commands.__file__).parent
    for file in folder.rglob("*.py"):
        if file.name != "console.py":
            source = file.read_text()
            for way in ("typer.echo(", "rich.console import Console", " print(", "sys.stdout"):
                found = [line for line in source.splitlines() if way in line]
                assert not found, f"{file}: {found}"
