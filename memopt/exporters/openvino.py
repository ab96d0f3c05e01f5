"""Portable ONNX to OpenVINO's own files."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memopt.errors import ExportError
from memopt.exporters.interface import by_name
from memopt.exporters.stateful import make_stateful
from memopt.extras import require, root_log_kept
from memopt.graphs.session import open_openvino
from memopt.runtimes.openvino_file import SEGMENTED, save_openvino

_log = logging.getLogger(__name__)


def to_openvino(
    source: Path, target: Path, *, half: bool, segmented: bool = False
) -> tuple[str, ...]:
    """Convert an ONNX file to ``target`` (.xml) and its .bin.

    Args:
        source: the portable ONNX file.
        target: path of the .xml; the weights go beside it.
        half: store weights as float16 (save_model's own default), else keep float32.
        segmented: the graph takes several texts a row, which the file then says.

    Returns:
        Names of the further files, relative to the folder of ``target``.

    Raises:
        ExportError: OpenVINO cannot read or write the graph.
    """
    openvino = require("openvino", extra="openvino", why="write OpenVINO files")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with root_log_kept():
            model = openvino.convert_model(source)
            make_stateful(model)
            if segmented:
                model.set_rt_info(True, list(SEGMENTED))
        save_openvino(model, target, half=half)
    except Exception as error:
        raise _refusal("read the graph", error) from error
    return (target.with_suffix(".bin").name,)


def compile_options(precision: str, *, cached: bool = False) -> dict[str, str]:
    """Return how a file is opened, so that OpenVINO computes in that precision.

    By itself it picks bf16 on processors that have it and, of a model ``cached`` keys and values
    are kept of, rounds these to int8: which is meant is always said.

    >>> compile_options("fp32", cached=True)
    {'INFERENCE_PRECISION_HINT': 'f32', 'KV_CACHE_PRECISION': 'f32'}
    """
    options = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
    return options | ({"KV_CACHE_PRECISION": "f32"} if cached and precision == "fp32" else {})


def sharing(precision: str, there: Callable[[str], bool]) -> list[str]:
    """Return the precisions to check: fp32 and bf16 share a file, so writing it renews both.

    Args:
        precision: what is written.
        there: says whether the bundle has a variant of another one.

    >>> sharing("fp32", lambda other: True)
    ['fp32', 'bf16']
    """
    shared = ("fp32", "bf16")
    twins = [p for p in shared if precision in shared and p != precision and there(p)]
    return [precision, *twins]


def runner(path: Path, outputs: tuple[str, ...], options: Mapping[str, str]) -> Any:
    """Return feeds -> outputs on OpenVINO's CPU plugin with these compile options.

    Raises:
        ExportError: OpenVINO cannot compile the graph; so does the function, where it cannot run.
    """
    try:
        observe = open_openvino(path, outputs, options)
    except Exception as error:
        raise _refusal("compile the graph", error) from error

    return by_name(observe, outputs, lambda on, error: _refusal(f"run the graph on {on}", error))


def _refusal(what: str, error: BaseException) -> ExportError:
    """Return one line for OpenVINO's many, which name its source files; the log has them."""
    _log.info("OpenVINO: %s", error)
    operators = re.search(r"for operations?: ([\w.]+(?:, [\w.]+)*)", str(error))
    where = f": it has no {operators[1]}" if operators else ""
    return ExportError(
        f"OpenVINO cannot {what}{where}",
        fix="export it as --format onnx; memopt --debug shows what OpenVINO says",
    )
