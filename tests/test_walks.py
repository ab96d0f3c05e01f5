"""The ways through the house that docs/architecture.md describes lead where it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text()
STOPS = sorted(set(re.findall(r"`([a-z_/]+\.py):([A-Za-z_.]+)`", TEXT)))


def names(tree: ast.AST, prefix: str = "") -> set[str]:
    """Functions, classes, methods and assigned names of a module."""
    defined: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                defined |= names(node, f"{prefix}{node.name}.")
    return defined


def test_all_five_ways_are_there() -> None:
    """A way that nobody describes is a way that nobody walks."""
    files = " ".join(file for file, _ in STOPS)
    for first in ("embed", "quantize", "memory/add", "memory/search", "sync/push"):
        assert f"commands/{first}.py" in files


@pytest.mark.parametrize(("file", "name"), STOPS, ids=lambda value: value)
def test_a_stop_is_there(file: str, name: str) -> None:
    """The file defines the function that the document names."""
    assert name in names(ast.parse((ROOT / "memopt" / file.removeprefix("memopt/")).read_text()))
