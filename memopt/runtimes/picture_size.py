"""How large an image processor makes a picture: the arithmetic of transformers' classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memopt.errors import BundleError

# Both edges, one of them, or a shorter edge with a bound on the longer.
_KINDS = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"})
_MOST = 1333  # of the longer edge, where a detector's file states only the shorter
_YOLOS_PATCH = 16  # its processor cuts both edges to multiples of this


def stated_size(value: Any, *, square: bool, longest: int | None = None) -> dict[str, int]:
    """Return a processor's ``size`` by edge.

    Args:
        value: what the file says, a number or an object.
        square: one number is both edges, not the shorter.
        longest: the bound on the longer edge that goes with one number, None for none.

    Raises:
        BundleError: it is neither.

    >>> stated_size(800, square=False, longest=1333)
    {'shortest_edge': 800, 'longest_edge': 1333}
    """
    if isinstance(value, int):
        if square:
            return {"height": value, "width": value}
        bound = {} if longest is None else {"longest_edge": longest}
        return {"shortest_edge": value, **bound}
    if isinstance(value, Mapping):
        size = {key: int(v) for key, v in value.items() if v is not None}
        if set(size) in _KINDS:
            return size
    raise BundleError(f"image size {value!r} in preprocessor_config.json is not supported")


def resized(
    kind: str, old: tuple[int, int], size: Mapping[str, int], config: Mapping[str, Any]
) -> tuple[tuple[int, int], int | None]:
    """Return the new (width, height), and the edge of a square to cut out of that, if any."""
    short = size.get("shortest_edge")
    share = config.get("crop_pct")
    if kind == "ConvNext" and short is not None and share is not None:
        if short >= 384:  # the class squeezes large ones and cuts small ones
            return (short, short), None
        return _shortest(old, int(short / share)), short
    if kind == "PoolFormer" and share is not None:
        if short is None and size["height"] != size["width"]:
            return (int(size["width"] / share), int(size["height"] / share)), None
        return _shortest(old, int((short or size["height"]) / share)), None
    if kind == "Levit" and short is not None:
        short = int((256 / 224) * short)
    if short is None:
        return (size["width"], size["height"]), None
    if "longest_edge" in size:
        return bounded(
            old, short, size["longest_edge"], _YOLOS_PATCH if kind == "Yolos" else 1
        ), None
    return _shortest(old, short), None


def bounded(old: tuple[int, int], short: int, longest: int, multiple: int = 1) -> tuple[int, int]:
    """Return (width, height) with a shorter edge of ``short``, or less so that ``longest`` holds.

    Args:
        old: (width, height) of the picture.
        short: of the shorter edge.
        longest: of the longer edge, at most.
        multiple: both edges are cut down to multiples of it.

    >>> bounded((200, 100), 80, 1333), bounded((400, 100), 80, 200)
    ((160, 80), (200, 50))
    """
    width, height = old
    small, large = min(old), max(old)
    exact = float(short)
    if large / small * short > longest:
        exact = longest * small / large
        short = round(exact)
    if small == short and (multiple == 1 or height <= width):
        new = old
    elif width < height:
        new = short, int(exact * height / width)
    else:
        new = int(exact * width / height), short
    return new[0] - new[0] % multiple, new[1] - new[1] % multiple


def _shortest(old: tuple[int, int], short: int) -> tuple[int, int]:
    width, height = old
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short
