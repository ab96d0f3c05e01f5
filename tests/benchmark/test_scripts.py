"""The scripts under benchmarks/ still fit the package, and refuse arguments in one line."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))

# All in one process: torch and transformers are imported once.
EVERY_HELP = """
import contextlib, io, runpy, sys
folder, *scripts = sys.argv[1:]
sys.path.insert(0, folder)

def code(script, *arguments):
    sys.argv = [script, *arguments]
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code, told.getvalue()
    return "no exit", told.getvalue()

for script in scripts:
    status, told = code(script, "--help")
    assert status == 0 and "usage:" in told, (script, status, told)
    if "--rounds" in told:
        status, told = code(script, "--rounds", "0")
        wanted = "argument --rounds: '0' is not a whole number of at least 1"
        assert status == 2 and wanted in told, (script, status, told)
"""


def names_of(module: str) -> set[str]:
    """The names at the top of a script, without running it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.ImportFrom():
                names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_name_that_a_script_imports_of_us_is_there(script: Path) -> None:
    """Inside its functions too: those imports are met only minutes into a measurement."""
    siblings = {sibling.stem for sibling in SCRIPTS}
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        names = {alias.name for alias in node.names}
        if node.module in siblings:
            assert names <= names_of(node.module), node.module
        elif node.module.partition(".")[0] == "memopt":
            module = importlib.import_module(node.module)
            for name in names:
                # What is no name of a package may be a module in it.
                if not hasattr(module, name):
                    importlib.import_module(f"{node.module}.{name}")


# Importing what they import, torch and lancedb among it, takes seven seconds.
@pytest.mark.slow
def test_every_script_tells_its_arguments_and_refuses_no_rounds() -> None:
    """--help ends with 0, --rounds 0 with 2 and a line that names the value."""
    scripts = [str(s) for s in SCRIPTS if "parse_args" in s.read_text(encoding="utf-8")]
    assert len(scripts) >= 29
    done = subprocess.run(
        [sys.executable, "-c", EVERY_HELP, str(FOLDER), *scripts], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["cold_start.py", "--bundle", "nope"], 1, "error: no bundle at 'nope'"),
        (["job_plan.py", "--rows", "0"], 2, "'0' is not a number above 0"),
        (["fusion.py", "nope"], 1, "error: No such file or directory (nope/onnx/model.onnx)"),
        (["serve.py", "--peer", "fastembd"], 2, "error: unknown peer 'fastembd'; did you mean"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_the_last_line_and_an_exit_code(
    arguments: list[str], code: int, said: str
) -> None:
    """A bundle, a number, a file and a peer that are none: no traceback."""
    command = [sys.executable, str(FOLDER / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
