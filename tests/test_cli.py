"""The command line: fast help, one error line, documented commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import memopt
from memopt.cli import COMMANDS

HEAVY = [
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "lancedb",
    "pyarrow",
    "scipy",
    "pandas",
    "PIL",
    "sklearn",
]


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memopt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def test_version_is_the_package_version() -> None:
    """--version prints the name and the version and nothing else."""
    assert run("--version").stdout == f"memopt {memopt.__version__}\n"


def test_help_loads_no_heavy_module() -> None:
    """Every command is registered without importing a library that does the work."""
    code = f"import sys, memopt.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_is_in_the_documentation(command: str) -> None:
    """A command without help or without an entry in docs/cli.md does not ship."""
    result = run(command, "--help")
    assert result.returncode == 0
    assert "Usage: memopt" in result.stdout
    assert f"## memopt {command}" in Path("docs/cli.md").read_text(encoding="utf-8")


def test_the_command_reference_is_up_to_date() -> None:
    """docs/cli.md is what docs/make_cli.py writes today."""
    result = subprocess.run(
        [sys.executable, "docs/make_cli.py", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_an_unknown_command_is_a_usage_error() -> None:
    """Exit code 2, no traceback."""
    result = run("exprot")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "exprot" in result.stderr


def test_errors_are_one_line_and_debug_adds_the_traceback(tmp_path: Path) -> None:
    """`error: problem; fix`, exit 1; --debug shows where it came from."""
    missing = str(tmp_path / "missing")
    result = run("info", missing)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"error: no bundle at {missing!r}; run: memopt convert SOURCE -o {missing}"
    ]
    assert "Traceback" in run("--debug", "info", missing).stderr
    assert "Traceback" in run("info", missing, "--debug").stderr


@pytest.mark.parametrize("path", ["file/config.yaml", "/proc/config.yaml"])
def test_a_path_that_cannot_be_written_is_one_line(path: str, tmp_path: Path) -> None:
    """Below a file, or where the system lets nobody write: the path is named, exit 1."""
    (tmp_path / "file").write_text("x")
    result = run("config", "init", path, cwd=tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("; give another path")


def test_the_shell_completes_commands_and_options() -> None:
    """--show-completion prints a script, and what the script asks for is answered."""
    # As bash itself asks: which shell it is, is otherwise read off the parent processes.
    script = run(env={**os.environ, "_MEMOPT_COMPLETE": "source_bash"}).stdout
    assert "complete -o default -F _memopt_completion memopt" in script.replace("\n", " ")
    for words, wanted in (
        ("memopt ex", ["export"]),
        ("memopt config ", ["show", "check", "init"]),
        ("memopt embed --dev", ["--device"]),
    ):
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = run(env={**os.environ, **asked, "_MEMOPT_COMPLETE": "complete_bash"})
        assert done.stdout.split() == wanted


def test_a_broken_pipe_is_no_error() -> None:
    """`memopt ... | head` does not end in a traceback."""
    result = subprocess.run(
        f"{sys.executable} -m memopt config show | head -1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout == "device:\n"
    assert "Traceback" not in result.stderr


def interrupted(folder: Path, module: str) -> subprocess.CompletedProcess[bytes]:
    path = os.pathsep.join([str(folder), str(Path(memopt.__file__).parents[1])])
    command = [sys.executable, "-m", module]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, check=False, env=environment, cwd=folder)


def test_ctrl_c_where_a_class_is_made_keeps_the_exit_code(tmp_path: Path) -> None:
    """Dataclasses are compiled from strings; after Ctrl-C there CPython ends `-m` by the signal."""
    lines = ["from memopt import cli", "def app(*_, **__): exec('raise KeyboardInterrupt')"]
    (tmp_path / "stopped.py").write_text("\n".join([*lines, "cli.app = app", "cli.main()"]))
    done = interrupted(tmp_path, "stopped")
    assert done.returncode == 130
    assert done.stderr.startswith(b"error: interrupted;")


def test_ctrl_c_before_the_command_keeps_the_exit_code(tmp_path: Path) -> None:
    """The same while `python -m memopt` is still being loaded."""
    package = tmp_path / "memopt"
    package.mkdir()
    main = Path(memopt.__file__).with_name("__main__.py")
    (package / "__main__.py").write_bytes(main.read_bytes())
    (package / "__init__.py").touch()
    (package / "cli.py").write_text("exec('raise KeyboardInterrupt')")
    assert interrupted(tmp_path, "memopt").returncode == 130
