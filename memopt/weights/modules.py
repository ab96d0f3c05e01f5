"""The modules that ``modules.json`` of a sentence-transformers folder names, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.bundle import read_json
from memopt.errors import WeightsError
from memopt.files import stays_below
from memopt.jsontext import parse_json

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
# What a Router says of its routes; the second file is of older versions.
ROUTES = ("router_config.json", "config.json")
# What can stand first, and what of the rest is run; Dropout does nothing when a model answers.
FIRST = ("Transformer", "CLIPModel", "MLMTransformer", "StaticEmbedding")
CHAIN = ("Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
# Of other kinds of model, whose own readers know them.
OTHER = ("SpladePooling", "MultiVectorMask", "Router")
# PyLate's classes that are sentence-transformers' own by another name.
_ALIASES = {"pylate.models.Dense.Dense": "sentence_transformers.models.Dense"}
# The modules with weights of their own beside the model's.
WEIGHED = ("Dense", "LayerNorm")


@dataclass(frozen=True, slots=True)
class Module:
    """One line of ``modules.json``: the class's last name, and its folder relative to the root."""

    kind: str
    path: str

    @property
    def prefix(self) -> str:
        """What the names of its weights begin with in ``weights.parquet``."""
        return f"{self.path}."

    def config(self, folder: Path) -> dict[str, Any]:
        """Return its ``config.json``, empty where it has none."""
        return json_object(folder / self.path / "config.json") if self.path else {}


def read_modules(folder: Path) -> tuple[Module, ...]:
    """Return the modules that ``modules.json`` names.

    Raises:
        WeightsError: the file is damaged, or names a module that memopt does not run.
    """
    path = folder / MODULES
    return tuple(_module(path, *entry) for entry in _entries(path))


def refuse_order(folder: Path, modules: Sequence[Module]) -> None:
    """Refuse what does not begin with the model, or has a second one.

    Raises:
        WeightsError: with the name of the module in the wrong place.
    """
    path = folder / MODULES
    if modules and modules[0].kind == "Router":
        raise WeightsError(
            f"{path} begins with a Router, which leads to several models",
            fix="convert one of them: memopt convert --route NAME",
        )
    if not modules or modules[0].kind not in FIRST:
        kinds = ", ".join(module.kind for module in modules) or "none"
        raise WeightsError(f"{path} does not start with a {FIRST[0]} module (it has {kinds})")
    if later := next((m.kind for m in modules[1:] if m.kind in (*FIRST, "Router")), None):
        raise WeightsError(
            f"{path} has a {later} module behind the model, in an order memopt does not run",
            fix=_RUNS,
        )


def json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty where there is no file."""
    return read_json(path) if path.is_file() else {}


_RUNS = f"models made of {FIRST[0]} and then {', '.join(CHAIN)} can be converted"


def _entries(path: Path) -> list[tuple[str, str]]:
    """Return the class and the folder of each line."""
    try:
        entries = parse_json(path.read_bytes(), "it", error=WeightsError)
        stated = [(str(e["type"]), e.get("path")) for e in entries]
    except (OSError, WeightsError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a list of modules ({error})") from error
    return [
        # Without a path the first lies in the root, the others under their number and name.
        (kind, ("" if i == 0 else f"{i}_{kind.rpartition('.')[2]}") if at is None else str(at))
        for i, (kind, at) in enumerate(stated)
    ]


def _module(path: Path, reference: str, inside: str) -> Module:
    reference = _ALIASES.get(reference, reference)
    kind = reference.rpartition(".")[2]
    if not reference.startswith("sentence_transformers."):
        raise WeightsError(
            f"{path} has a module {reference!r} with Python code of its own, which memopt "
            "never runs",
            fix="use a model made of sentence-transformers' own modules",
        )
    if kind not in FIRST + CHAIN + OTHER:
        raise WeightsError(f"{path} has a {kind} module, which memopt does not run", fix=_RUNS)
    if not stays_below(inside):
        raise WeightsError(f"{path} has the path {inside!r:.200}, which is not below the folder")
    return Module(kind, "" if inside == "." else inside.rstrip("/"))
