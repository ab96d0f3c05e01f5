"""``memopt rerank``: documents in the order in which they answer a query."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import echo


def rerank(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    query: Annotated[str, typer.Option("--query", "-q", help="What the documents shall answer.")],
    documents: Annotated[list[str] | None, typer.Argument(help="The documents.")] = None,
    source: Annotated[
        str | None,
        typer.Option("--input", "-i", help=".txt, .jsonl, .csv, .parquet, - for stdin."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column to read of a file.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Documents shown.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda, openvino, cpu, ...")] = None,
    variant: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Order documents by how well they answer a query, the best first."""
    from rich.table import Table

    from memopt.commands.answers import given
    from memopt.commands.console import stdout
    from memopt.runtimes.configured import open_configured
    from memopt.runtimes.engines.reranker import Reranker

    texts = [text for _, text in given(documents or [], source, column, "text")]
    with open_configured(Reranker, bundle, device, variant) as engine:
        ranked = engine.rank(query, texts, top=top, show_progress=True)
    best = [(int(i), float(s)) for i, s in zip(ranked.order, ranked.scores, strict=True)]
    if as_json:
        rows = [{"index": i, "score": s, "document": texts[i]} for i, s in best]
        echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    table = Table("rank", "score", "number", "document")
    for place, (i, score) in enumerate(best, start=1):
        table.add_row(str(place), f"{score:.4f}", str(i), texts[i][:90])
    stdout(120).print(table)
