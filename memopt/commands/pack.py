"""``memopt pack``: what one machine needs of a bundle, as a folder or a tar file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import echo


def pack(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New folder, or a .tar, .tar.gz or .tgz file.")
    ],
    target: Annotated[
        str, typer.Option(help="Provider that will run it: cpu, openvino, cuda, ... or auto.")
    ] = "cpu",
    variants: Annotated[
        str,
        typer.Option(help="Names, with commas [default: the best one measured for the target]."),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a bundle that holds only what the target needs: no weights, caches, other variants."""
    from dataclasses import asdict

    from memopt.runtimes.pack import pack as run

    names = [name.strip() for name in variants.split(",") if name.strip()]
    packed = run(bundle, output, target=target, variants=names)
    if as_json:
        echo(json.dumps({**asdict(packed), "path": str(packed.path)}, indent=1))
        return
    echo(
        f"{packed.path}: {', '.join(packed.variants)}, {packed.bytes / 1e6:.1f} MB "
        f"of {packed.bytes_before / 1e6:.1f}"
    )
