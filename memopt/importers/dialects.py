"""ONNX and OpenVINO files read alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from memopt.importers import onnx_file, xml_file
from memopt.importers.graph_file import GraphFile, storable


def read_graph(path: Path) -> GraphFile:
    """Read what a graph says of itself, and check that its files are whole.

    Raises:
        ExportError: no graph of that format, a file of it is missing or outside its folder, or it
            uses operators that no runtime here has.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model.onnx"
    >>> _ = path.write_text("not a graph")
    >>> read_graph(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    memopt.errors.ExportError: ...model.onnx is not an ONNX file ...
    """
    if path.suffix.lower() == ".xml":
        return xml_file.read_xml(path)
    return onnx_file.read_onnx_file(path)


def weights_of(graph: GraphFile) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the name and values of each weight of a graph; names given twice get a number."""
    dialect = xml_file if graph.format == "openvino" else onnx_file
    seen: Counter[str] = Counter()
    for name, values in dialect.constants(graph.path):
        seen[name] += 1
        yield (name if seen[name] == 1 else f"{name}.{seen[name]}"), storable(values)
