"""``memopt segments``: when somebody speaks in sounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import echo


def segments(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    inputs: Annotated[list[str] | None, typer.Argument(help="Paths of sounds.")] = None,
    source: Annotated[
        str | None, typer.Option("--input", "-i", help=".jsonl, .csv, .parquet, a folder.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column to read of a file.")] = None,
    threshold: Annotated[float, typer.Option(help="How probable speech has to be to begin.")] = 0.5,
    device: Annotated[str | None, typer.Option(help="auto, cuda, openvino, cpu, ...")] = None,
    variant: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Say from when to when somebody speaks, with a graph of voice activity (Silero's)."""
    from memopt.commands.answers import given, plain
    from memopt.runtimes.configured import open_configured
    from memopt.runtimes.engines.voice import VoiceDetector

    with open_configured(VoiceDetector, bundle, device, variant) as engine:
        for name, sound in given(inputs or [], source, column, "audio"):
            found = engine.segments(sound, threshold=threshold)
            if as_json:
                echo(json.dumps({"input": name, "segments": plain(found)}, ensure_ascii=False))
                continue
            echo(f"{name}: {len(found)} segments" if found else f"{name}: nobody speaks")
            for part in found:
                echo(f"  {part.start:9.3f} s to {part.end:9.3f} s   {part.score:.3f}")
