"""What an OpenVINO graph says of its axes."""

from __future__ import annotations

from typing import Any


def takes_one_row(model: Any) -> bool:
    """Whether a graph was made for batches of one: the first axis of all its inputs is 1."""
    shapes = [port.get_partial_shape() for port in model.inputs]
    return bool(shapes) and all(
        s.rank.is_static and s.rank.get_length() > 0 and s[0].is_static and s[0].get_length() == 1
        for s in shapes
    )


def last_axis(shape: Any) -> int | None:
    """Return the length of the last axis, None where it is not fixed or there is none."""
    if shape.rank.is_dynamic or not shape.rank.get_length() or shape[-1].is_dynamic:
        return None
    return int(shape[-1].get_length())
