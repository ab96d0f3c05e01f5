"""Options that several ``memopt sync`` commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Server = Annotated[str, typer.Option("--server", help="host:port of memopt sync serve.")]
Node = Annotated[str, typer.Option(help="This node's name.")]
Keys = Annotated[Path, typer.Option(help="Folder of certificates, keys and trust.json.")]
Plain = Annotated[bool, typer.Option("--plain", help="No TLS: loopback only.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow --plain off loopback.")]
Deadline = Annotated[
    float | None, typer.Option(help="Seconds that all of it may take, retries included.")
]
State = Annotated[Path, typer.Option(help="Folder of this node's sync state.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dictionary = Annotated[Path | None, typer.Option(help="zstd dictionary, the same on both ends.")]
Codec = Annotated[
    str | None, typer.Option(help="lossless, fp16, int8, int4, topk or auto [default: int8].")
]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="Seal weights at rest under this key [default: $MEMOPT_WEIGHTS_KEY]."),
]
DEFAULT_STATE, DEFAULT_KEYS = Path(".memopt-sync"), Path("keys")
