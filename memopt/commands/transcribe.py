"""``memopt transcribe``: what is said in sounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from memopt.commands.console import echo


def transcribe(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    inputs: Annotated[list[str] | None, typer.Argument(help="Paths of sounds.")] = None,
    source: Annotated[
        str | None, typer.Option("--input", "-i", help=".jsonl, .csv, .parquet, a folder.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column to read of a file.")] = None,
    language: Annotated[
        str | None, typer.Option(help="Its code (en); without it the model hears which it is.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="transcribe, or translate into English.")] = None,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Print each segment with its seconds.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="auto, cuda, openvino, cpu, ...")] = None,
    variant: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Write what is said in sounds of any length, with a Whisper."""
    from functools import partial

    from memopt.commands.answers import given, plain
    from memopt.commands.console import steps
    from memopt.runtimes.configured import open_configured
    from memopt.runtimes.engines.transcriber import Transcriber

    how: dict[str, Any] = {"language": language, "task": task, "timestamps": timestamps}
    opener = partial(Transcriber, threads=threads)
    with open_configured(opener, bundle, device, variant) as engine:
        for name, sound in given(inputs or [], source, column, "audio"):
            with steps("transcribe") as say:
                (found,) = engine.transcribe(
                    sound, **how, progress=lambda done, total: say(f"{done:.0f} of {total:.0f} s")
                )
            if as_json:
                echo(json.dumps({"input": name, **plain(found)}, ensure_ascii=False))
            elif timestamps:
                for part in found.segments:
                    echo(f"{part.start:9.2f} s to {part.end:9.2f} s  {part.text.strip()}")
            else:
                echo(found.text.strip())
