"""Imports form no circle anywhere, type hints included, and the drawing of the rooms shows them."""

from __future__ import annotations

import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from xml.etree import ElementTree

import grimp
import pytest


def test_imports_form_no_circle() -> None:
    """Also not those within functions; what is looked up by name at run time is not seen."""
    graph = grimp.build_graph("memopt", cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    try:
        order = list(TopologicalSorter(imports).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert len(order) > 200


def test_the_drawing_of_the_rooms_is_up_to_date() -> None:
    """docs/rooms.svg is what docs/make_rooms.py draws today."""
    result = subprocess.run(
        [sys.executable, "docs/make_rooms.py", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_every_arrow_of_the_drawing_leads_down() -> None:
    """Each package is a room of the drawing; an arrow ends below where it begins."""
    drawing = ElementTree.parse("docs/rooms.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    names = {text.text for text in drawing.iter(f"{space}text") if text.get("class") == "name"}
    assert {path.parent.name for path in Path("memopt").glob("*/__init__.py")} <= names
    arrows = [path for path in drawing.iter(f"{space}path") if path.get("class") == "way"]
    assert len(arrows) >= len(names) - 1
    for arrow in arrows:
        heights = [int(end) for end in re.findall(r"(\d+)(?=[A-Z]|$)", arrow.get("d") or "")]
        assert heights == sorted(heights)
