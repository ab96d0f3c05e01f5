"""``memopt answer``: the part of each text that answers a question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def answer(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    question: Annotated[str, typer.Option("--question", "-q", help="What the texts shall answer.")],
    inputs: Annotated[list[str] | None, typer.Argument(help="Texts, of any length.")] = None,
    source: Annotated[
        str | None,
        typer.Option("--input", "-i", help=".txt, .jsonl, .csv, .parquet, - for stdin."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column to read of a file.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Answers of each text.")] = 1,
    impossible: Annotated[
        bool, typer.Option("--impossible", help="A text may not say it (SQuAD 2 models).")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .jsonl file.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda, openvino, cpu, ...")] = None,
    variant: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Find the part of each text that answers a question."""
    from memopt.commands.answers import answered, given, show
    from memopt.runtimes.configured import open_configured
    from memopt.runtimes.engines.answerer import QuestionAnswerer

    with open_configured(QuestionAnswerer, bundle, device, variant) as engine:

        def answers(texts: list[Any]) -> list[Any]:
            found = engine.answer([question] * len(texts), texts, top, impossible=impossible)
            return [{"answers": each} for each in found]

        rows = answered(given(inputs or [], source, column, "text"), answers)
        show(rows, output, as_json, _print)


def _print(rows: list[tuple[str, Any]]) -> None:
    from rich.table import Table

    from memopt.commands.console import stdout

    table = Table("input", "answer", "characters", "score")
    for name, found in rows:
        for each in found["answers"]:
            place = f"{each.start}-{each.end}"
            table.add_row(name[:40], each.text or "(none)", place, f"{each.score:.3f}")
        if not found["answers"]:
            table.add_row(name[:40], "-", "", "")
    stdout(120).print(table)
