"""Options that several memory commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Store = Annotated[str, typer.Argument(help="Folder or URI of the store.")]
Text = Annotated[str | None, typer.Option("--model", help="Bundle that encodes texts.")]
Vision = Annotated[str | None, typer.Option(help="Bundle that encodes pictures.")]
Audio = Annotated[str | None, typer.Option(help="Bundle that encodes sounds.")]
Joint = Annotated[str | None, typer.Option(help="Bundle of the joint layer.")]
Key = Annotated[
    Path | None, typer.Option(help="File of the key [default: variable MEMOPT_MEMORY_KEY].")
]
Redaction = Annotated[
    str, typer.Option(help="patterns, presidio, auto, or none: what is taken out of texts.")
]
SendUnredacted = Annotated[
    bool, typer.Option("--send-unredacted", help="Let --llm read the texts as they are.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Category = Annotated[
    list[str] | None, typer.Option("--category", help="Only these categories; repeatable.")
]
Since = Annotated[str | None, typer.Option(help="ISO time, inclusive.")]
Until = Annotated[str | None, typer.Option(help="ISO time, exclusive.")]
