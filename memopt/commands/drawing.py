"""Pictures with the boxes that were found in them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.extras import require
from memopt.files import atomic_path

if TYPE_CHECKING:
    from memopt.tasks.boxes import Detection

# Of Okabe and Ito, told apart by most who do not see all colours.
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")


def draw_boxes(item: Any, things: Sequence[Detection], folder: Path, taken: set[str]) -> Path:
    """Write a PNG of the picture with a box and a label for each thing; return its path.

    Args:
        item: a path, or encoded bytes.
        things: what was found, in pixels of the picture.
        folder: made where it is missing.
        taken: file names that were given out, to which this one is added: two pictures of one name
            get two files.
    """
    require("PIL.Image", extra="media", why="draw boxes")
    from PIL import Image, ImageDraw, ImageOps

    source = io.BytesIO(item) if isinstance(item, bytes | bytearray) else item
    with Image.open(source) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    pen = ImageDraw.Draw(image)
    width = max(1, round(max(image.size) / 300))
    names = sorted({thing.label for thing in things})
    for thing in things:
        colour = _COLOURS[names.index(thing.label) % len(_COLOURS)]
        left, top, right, bottom = thing.box
        edges = (min(left, right), min(top, bottom), max(left, right), max(top, bottom))
        pen.rectangle(edges, outline=colour, width=width)
        place = (edges[0] + width + 1, max(edges[1], 0) + width)
        pen.text(place, f"{thing.label} {thing.score:.2f}", fill=colour)
    stem = Path(str(item)).stem if isinstance(item, str | Path) else "picture"
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / f"{name}.png") as path:
        image.save(path, format="PNG")
    return folder / f"{name}.png"
