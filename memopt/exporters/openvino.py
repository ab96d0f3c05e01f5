"""Portable ONNX to OpenVINO's own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memopt.errors import ExportError
from memopt.extras import require, root_log_kept
from memopt.runtimes.openvino_file import save_openvino


def to_openvino(source: Path, target: Path, *, half: bool) -> tuple[str, ...]:
    """Convert an ONNX file to ``target`` (.xml) and its .bin.

    Args:
        source: the portable ONNX file.
        target: path of the .xml; the weights go beside it.
        half: store weights as float16 (save_model's own default), else keep float32.

    Returns:
        Names of the further files, relative to the folder of ``target``.

    Raises:
        ExportError: OpenVINO cannot read the graph; its first line is in the message.
    """
    openvino = require("openvino", extra="openvino", why="write OpenVINO files")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with root_log_kept():
            model = openvino.convert_model(source)
    except Exception as error:
        line = (str(error).strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"OpenVINO cannot read the graph: {line[:300]}") from error
    save_openvino(model, target, half=half)
    return (target.with_suffix(".bin").name,)


def runner(path: Path, outputs: tuple[str, ...], options: Mapping[str, str]) -> Any:
    """Return feeds -> outputs on OpenVINO's CPU plugin with these compile options."""
    openvino = require("openvino", extra="openvino", why="check the exported graph")
    compiled = openvino.Core().compile_model(path, "CPU", dict(options))
    names = {name for port in compiled.inputs for name in port.names}

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        found = compiled({k: v for k, v in feeds.items() if k in names})
        return {name: found[name].copy() for name in outputs}

    return run
