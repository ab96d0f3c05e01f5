"""Writing OpenVINO's files so that the same model gives the same bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from memopt.extras import require


def save_openvino(model: Any, target: Path, *, half: bool = False) -> None:
    """Write ``target`` (.xml) and its .bin.

    OpenVINO names what it adds ``Constant_5859`` after a counter of the process, so the second
    model a process writes would differ from the same model written first: such names are given by
    position in the graph instead.

    Args:
        model: an ``openvino.Model``; its operations may be renamed.
        target: path of the .xml.
        half: store weights as float16.
    """
    openvino = require("openvino", extra="openvino", why="write OpenVINO files")
    for number, node in enumerate(model.get_ordered_ops()):
        # A folded constant keeps the name of the operation it was: Range_43 of type Constant.
        made_up = re.fullmatch(r"([A-Z][A-Za-z0-9]*)_\d+", node.get_friendly_name())
        if made_up and node.get_type_name() not in ("Parameter", "Result"):
            node.set_friendly_name(f"{made_up[1]}_n{number}")
    openvino.save_model(model, str(target), compress_to_fp16=half)
