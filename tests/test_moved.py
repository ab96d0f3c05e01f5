"""What programs imported before the rooms were built is found where it lies now."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys

import pytest

from memopt.moved import MOVED, RENAMED

CODE = """
import importlib, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    old = importlib.import_module({old!r})
assert [w.category for w in caught if {old!r} in str(w.message)] == [DeprecationWarning]
new = importlib.import_module({new!r})
assert old is new
assert new.__name__ == new.__spec__.name == {new!r}
importlib.reload(new)
"""


@pytest.mark.parametrize("old", MOVED)
def test_every_old_path_leads_to_a_module(old: str) -> None:
    """The target exists, and nothing lies under the old name any more."""
    parent = old.rpartition(".")[0]
    assert importlib.util.find_spec(MOVED[old]) is not None
    package = importlib.import_module(parent)
    assert importlib.machinery.PathFinder.find_spec(old, package.__path__) is None


@pytest.mark.parametrize("old", ["memopt.memory.schema", "memopt.federation.signing"])
def test_the_old_path_gives_the_same_module(old: str) -> None:
    """With a warning, once, and the module keeps its own name and can be loaded again."""
    code = CODE.format(old=old, new=MOVED[old])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("memopt.memory.store", ["MemoryStore"]),
        ("memopt.memory.graph", ["AssociationGraph", "GraphRecipe"]),
        ("memopt.federation.client", ["SyncClient"]),
        ("memopt.federation.server", ["SyncServer"]),
        ("memopt.federation.delta", ["compute_delta", "apply_delta"]),
        ("memopt.federation.trust", ["SigningKey", "Trust", "VersionManifest", "add_trusted"]),
    ],
)
def test_a_package_gives_the_names_of_the_module_before_it(module: str, names: list[str]) -> None:
    """Packages that have an old module's name have its public names."""
    package = importlib.import_module(module)
    assert all(callable(getattr(package, name)) for name in names)
    assert not hasattr(package, "nothing_of_that_name")


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in RENAMED.items() for name in names]
)
def test_a_name_of_before_is_found_under_its_new_one(module: str, name: str) -> None:
    """With a warning that says where it is; others are missing as ever."""
    home, _, new = RENAMED[module][name].partition(":")
    with pytest.warns(DeprecationWarning, match=f"{name} is {home}.{new} now"):
        old = getattr(importlib.import_module(module), name)
    assert old is getattr(importlib.import_module(home), new)
    assert not hasattr(importlib.import_module(module), "nothing_of_that_name")
