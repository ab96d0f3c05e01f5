"""``memopt convert``: a checkpoint into a bundle, or a bundle back into safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memopt.commands.console import echo

if TYPE_CHECKING:
    from memopt.bundle import Bundle

_SOURCE = (
    "Hugging Face folder, GGUF file, hub id, package:NAME/FOLDER, a name from models/*.yaml, "
    "Parquet weights (V1 or V2), or (with --to) a bundle."
)


def convert(
    source: Annotated[str, typer.Argument(help=_SOURCE)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Bundle folder [default: models/NAME]; with --to, the file."
        ),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="Go back: 'safetensors' writes the bundle's weights.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="embedding | text-generation | text2text-generation | ... "
            "[default: what the config says]."
        ),
    ] = None,
    compression: Annotated[
        str, typer.Option(help="none (weights can be memory-mapped) | zstd.")
    ] = "none",
    config: Annotated[
        Path | None,
        typer.Option(help="Folder with config.json and tokenizer, for Parquet weights alone."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    route: Annotated[
        str | None, typer.Option(help="Which model of a Router: query, document, ...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Store a model's weights in Parquet with its config and tokenizer: a bundle."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn

    from memopt.commands.console import progress, stderr
    from memopt.errors import ConfigurationError
    from memopt.weights.convert import convert

    if to is not None:
        _back(source, to, output, as_json=as_json)
        return
    if compression not in ("none", "zstd"):
        raise ConfigurationError(
            f"--compression {compression!r} is not known", fix="use none or zstd"
        )
    errors = stderr()
    name = TextColumn("{task.description}", markup=False)
    with progress(name, BarColumn(), DownloadColumn(), transient=True) as update:
        bundle = convert(
            source,
            output,
            task=task,
            compression=None if compression == "none" else compression,
            revision=revision,
            config=config,
            route=route,
            on_step=lambda name, done, total: update(
                description=name[-40:], completed=done, total=total
            ),
            on_warning=lambda line: errors.print(f"warning: {line}", markup=False),
        )
    _print(bundle, as_json)


def _print(bundle: Bundle, as_json: bool) -> None:
    m = bundle.manifest
    if as_json:
        echo(json.dumps({"path": str(bundle.path), **json.loads(m.to_json())}))
        return
    size = bundle.weights.stat().st_size
    echo(
        f"{bundle.path}: {m.architecture}, {m.task}, dimension {m.dimension}, pooling {m.pooling}, "
        f"weights {size / 1e6:.1f} MB"
    )


def _back(source: str, to: str, output: Path | None, *, as_json: bool) -> None:
    from memopt.bundle import open_bundle
    from memopt.errors import ConfigurationError
    from memopt.weights.convert import to_safetensors
    from memopt.weights.locked import unlocked

    if to != "safetensors":
        raise ConfigurationError(f"--to {to!r} is not a format", fix="use --to safetensors")
    opened = open_bundle(source)
    with unlocked(opened) as plain:
        path = to_safetensors(plain, output or opened.path / "model.safetensors")
    size = path.stat().st_size
    echo(json.dumps({"file": str(path), "bytes": size}) if as_json else f"{path}  {size:,} bytes")
