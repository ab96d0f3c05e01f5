"""No module needs, over others, itself: imports form no circle anywhere, type hints included."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

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
