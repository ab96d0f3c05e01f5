"""``memopt tag``: the labelled parts of texts: names, places, parts of speech."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def tag(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    inputs: Annotated[list[str] | None, typer.Argument(help="Texts, of any length.")] = None,
    source: Annotated[
        str | None,
        typer.Option("--input", "-i", help=".txt, .jsonl, .csv, .parquet, - for stdin."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column to read of a file.")] = None,
    aggregation: Annotated[
        str, typer.Option(help="simple, first, max, average, or none for every token.")
    ] = "simple",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .jsonl file.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda, openvino, cpu, ...")] = None,
    variant: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Find the labelled parts of texts, with their characters."""
    from memopt.commands.answers import answered, given, show
    from memopt.runtimes.configured import open_configured
    from memopt.runtimes.engines.tagger import TokenClassifier

    with open_configured(TokenClassifier, bundle, device, variant) as engine:

        def answer(texts: list[Any]) -> list[Any]:
            return [{"spans": spans} for spans in engine.tag(texts, aggregation)]

        show(answered(given(inputs or [], source, column, "text"), answer), output, as_json, _print)


def _print(rows: list[tuple[str, Any]]) -> None:
    from rich.table import Table

    from memopt.commands.console import stdout

    table = Table("input", "label", "text", "characters", "score")
    for name, found in rows:
        for span in found["spans"]:
            place = f"{span.start}-{span.end}"
            table.add_row(name[:40], span.label, span.text[:60], place, f"{span.score:.3f}")
        if not found["spans"]:
            table.add_row(name[:40], "-", "", "", "")
    stdout(120).print(table)
