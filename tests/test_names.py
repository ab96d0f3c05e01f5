"""One word means one thing: no two public classes of the house have one name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent / "memopt"


def test_no_two_public_classes_have_one_name() -> None:
    """Two classes of one name are two things that readers take for one."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        # compat gives the founding design's names to what has others here: that is what it is for.
        if path.is_relative_to(ROOT / "compat"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
