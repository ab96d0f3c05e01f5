"""README's Python example runs as written, and every path and command it names exists."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from pydoc import locate

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from memopt.bundle import Bundle
from memopt.cli import COMMANDS, app

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


def commands(page: str) -> list[list[str]]:
    """The arguments of every `memopt` line in a page's blocks, as a shell would read them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = re.findall(r"(?m)^    (memopt .*)$", text)
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" ; ")]
    return [command[1:] for command in words]


PAGES = ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md") if p.stem != "cli")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_documentation_parses(page: str) -> None:
    """Names, options and numbers of arguments are those of the command line."""
    for arguments in commands(page):
        command = get_command(app)
        while hasattr(command, "commands"):
            name, *arguments = arguments
            command = command.commands[name]
        command.make_context(name, list(arguments))


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_every_module_and_file_of_the_documentation_exists(page: str) -> None:
    """`memopt.a.b` can be imported, a path of the repository is there."""
    text = (ROOT / page).read_text(encoding="utf-8")
    names = set(re.findall(r"(?<![\w/.])memopt(?:\.[A-Za-z_]\w*)+", text))
    # Files that users have, and the name of a logger.
    names -= {"memopt.json", "memopt.yaml", "memopt.inference"}
    assert [name for name in sorted(names) if locate(name) is None] == []
    paths = re.findall(r"(?<![\w./])(?:memopt|tests|examples|benchmarks|docs)/[\w/]+\.\w+", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_drawn_layers_are_those_that_are_checked() -> None:
    """docs/architecture.md and the contract of import-linter name the same layers in one order."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    (drawn,) = re.findall(r"`(cli -> [^`]*)`", text)
    assert " ".join(drawn.split()) == " -> ".join(x for x in layers if x != "__main__")


def fresh_clone(folder: Path, minilm: Bundle) -> None:
    """A folder as after `git clone` and `make demo`, and the commands run there."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "models").mkdir()
    for file in (ROOT / "models").glob("*.yaml"):
        shutil.copy(file, folder / "models")
    ignore = shutil.ignore_patterns(".*")
    shutil.copytree(minilm.path, folder / "models" / "minilm", ignore=ignore)


def run_there(folder: Path, arguments: list[str]) -> None:
    """Run one command in that folder; it must end well."""
    done = subprocess.run(
        [sys.executable, "-m", "memopt", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr}"


def test_the_memory_page_runs_as_written(
    minilm: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command but the worker, which has no end, and then the Python block."""
    fresh_clone(tmp_path, minilm)
    monkeypatch.chdir(tmp_path)
    for arguments in commands("docs/memory.md"):
        if arguments[:2] != ["memory", "worker"]:
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, f"{arguments}: {done.output} {done.exception}"
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/memory.md").read_text(encoding="utf-8"), flags=re.S
    )
    exec(compile(block, "memory.md", "exec"), {})


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_readme_runs_as_written(minilm: Bundle, tmp_path: Path) -> None:
    """All commands in order, from the folder of a fresh clone."""
    fresh_clone(tmp_path, minilm)
    for arguments in commands("README.md"):
        run_there(tmp_path, arguments)
