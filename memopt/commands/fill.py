"""``memopt fill``: the words that fit in the gaps of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def fill(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Texts with the model's mask: [MASK], <mask>.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--input", "-i", help=".txt, .jsonl, .csv, .parquet, - for stdin."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column to read of a file.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Words of each gap.")] = 5,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .jsonl file.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda, openvino, cpu, ...")] = None,
    variant: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Say which words fit in each gap of texts, the likeliest first."""
    from memopt.commands.answers import answered, given, show
    from memopt.runtimes.configured import open_configured
    from memopt.runtimes.engines.filler import MaskFiller

    with open_configured(MaskFiller, bundle, device, variant) as engine:

        def answer(texts: list[Any]) -> list[Any]:
            return [{"masks": masks} for masks in engine.fill(texts, top)]

        show(answered(given(inputs or [], source, column, "text"), answer), output, as_json, _print)


def _print(rows: list[tuple[str, Any]]) -> None:
    from rich.table import Table

    from memopt.commands.console import stdout

    table = Table("input", "characters", "words")
    for name, found in rows:
        for mask in found["masks"]:
            words = zip(mask.tokens, mask.scores, strict=True)
            best = ", ".join(f"{word.strip()} {score:.3f}" for word, score in words)
            table.add_row(name[:40], f"{mask.start}-{mask.end}", best)
    stdout(120).print(table)
