"""``memopt detect``: the things in pictures, with their boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def detect(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    images: Annotated[list[str] | None, typer.Argument(help="Paths of pictures.")] = None,
    source: Annotated[
        str | None, typer.Option("--input", "-i", help="A folder, .txt, .jsonl, .csv, .parquet.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column to read of a file.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Least score.")] = 0.5,
    draw: Annotated[
        Path | None, typer.Option(help="Folder for copies of the pictures with the boxes.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .jsonl file.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda, openvino, cpu, ...")] = None,
    variant: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Find things in pictures: label, score and box in pixels (left, top, right, bottom)."""
    from memopt.commands.answers import answered, given, show
    from memopt.commands.drawing import draw_boxes
    from memopt.runtimes.configured import open_configured
    from memopt.runtimes.engines.detector import Detector

    drawn: set[str] = set()
    with open_configured(Detector, bundle, device, variant) as engine:

        def answer(items: list[Any]) -> list[Any]:
            found = engine.detect(items, threshold=threshold)
            if draw is not None:
                for item, things in zip(items, found, strict=True):
                    draw_boxes(item, things, draw, drawn)
            return [{"detections": things} for things in found]

        rows = answered(given(images or [], source, column, "image"), answer)
        show(rows, output, as_json, _print)


def _print(rows: list[tuple[str, Any]]) -> None:
    from rich.table import Table

    from memopt.commands.console import stdout

    table = Table("picture", "label", "score", "left", "top", "right", "bottom")
    for name, found in rows:
        things = found["detections"]
        for thing in things:
            edges = (f"{edge:.0f}" for edge in thing.box)
            table.add_row(name[-60:], thing.label, f"{thing.score:.3f}", *edges)
        if not things:
            table.add_row(name[-60:], "-", "", "", "", "", "")
    stdout(120).print(table)
