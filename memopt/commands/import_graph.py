"""``memopt import``: a bundle around an ONNX or OpenVINO graph that somebody else made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import echo


def import_graph(
    source: Annotated[
        str,
        typer.Argument(help="A .onnx or .xml file, a folder that holds one, package:NAME/PATH."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Bundle folder [models/NAME].")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of its tokenizer, where it lies elsewhere.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Its config.json, or the folder of its settings.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Its task [what inputs, outputs and config say].")
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option(help="THEIRS=OURS of an input, several times.")
    ] = None,
    output_name: Annotated[
        str | None, typer.Option("--output", help="The output that is the answer.")
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="mean | cls | max, of a graph of token vectors.")
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option("--normalize/--no-normalize", help="Vectors of unit length.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens that it takes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a bundle around a graph that somebody else made; it stays byte for byte."""
    from memopt.commands.console import stderr
    from memopt.importers.base import import_graph

    errors = stderr()
    bundle = import_graph(
        source,
        output,
        tokenizer=tokenizer,
        config=config,
        task=task,
        rename=_pairs(rename or []),
        output_name=output_name,
        pooling=pooling,
        normalize=normalize,
        max_length=max_length,
        on_warning=lambda line: errors.print(f"warning: {line}", markup=False),
    )
    m = bundle.manifest
    if as_json:
        echo(json.dumps({"path": str(bundle.path), **json.loads(m.to_json())}))
        return
    [variant] = m.variants.values()
    told = (variant.check or {})["graph"]
    opset = f", opset {told['opset']}" if told["opset"] else ""
    kind = f"{told['precision']} {told['quantization']}".strip()
    echo(f"{bundle.path}: {m.task}, {told['format']}{opset}, {kind}, runs {variant.file}")
    for side in ("inputs", "outputs"):
        echo(f"  {side}: " + "; ".join(_port(port) for port in told[side]))


def _port(port: dict[str, object]) -> str:
    shape = port["shape"]
    sizes = ", ".join(map(str, shape)) if isinstance(shape, list) else "?"
    return f"{port['name']} {port['dtype']} ({sizes})"


def _pairs(values: list[str]) -> dict[str, str]:
    from memopt.errors import ConfigurationError

    pairs = dict(value.partition("=")[::2] for value in values)
    for theirs, ours in pairs.items():
        if not theirs or not ours:
            raise ConfigurationError(f"--rename {theirs!r} is no THEIRS=OURS")
    return pairs
