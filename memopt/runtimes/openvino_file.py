"""Writing OpenVINO's files so that the same model gives the same bytes."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

from memopt.errors import ExportError
from memopt.extras import require

# What a failed write leaves free on a full disk: less than its last buffer.
_ALMOST_FULL = 1 << 20

# Where a file says that its graph takes several texts a row, told apart by the mask's numbers.
SEGMENTED = ("memopt", "segments")


def is_segmented(model: Any) -> bool:
    """Return whether an ``openvino.Model`` takes several texts a row."""
    return bool(model.has_rt_info(list(SEGMENTED)))


def save_openvino(model: Any, target: Path, *, half: bool = False) -> None:
    """Write ``target`` (.xml) and its .bin.

    OpenVINO names what it adds ``Constant_5859`` after a counter of the process, so the second
    model a process writes would differ from the same model written first: such names are given by
    position in the graph instead.

    Args:
        model: an ``openvino.Model``; its operations may be renamed.
        target: path of the .xml.
        half: store weights as float16.

    Raises:
        OSError: the disk is full.
        ExportError: OpenVINO cannot write the files for another reason.
    """
    openvino = require("openvino", extra="openvino", why="write OpenVINO files")
    for number, node in enumerate(model.get_ordered_ops()):
        # A folded constant keeps the name of the operation it was: Range_43 of type Constant.
        made_up = re.fullmatch(r"([A-Z][A-Za-z0-9]*)_\d+", node.get_friendly_name())
        if made_up and node.get_type_name() not in ("Parameter", "Result"):
            node.set_friendly_name(f"{made_up[1]}_n{number}")
    try:
        openvino.save_model(model, str(target), compress_to_fp16=half)
    except RuntimeError as error:
        # Its C++ streams fail without a reason: "basic_ios::clear: iostream error".
        if shutil.disk_usage(target.parent).free < _ALMOST_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
        raise ExportError(f"OpenVINO cannot write {target}: {error}") from error
