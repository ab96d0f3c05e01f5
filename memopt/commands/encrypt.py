"""``memopt encrypt``: put a bundle's weights under a key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import echo


def encrypt(
    bundle: Annotated[str, typer.Argument(help="A bundle folder, or the name of a built bundle.")],
    key_file: Annotated[
        Path | None, typer.Option(help="64 hex digits [default: $MEMOPT_WEIGHTS_KEY].")
    ] = None,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make the key file first; one that is there stays.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Decrypt the files again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Encrypt weights and graphs with AES-256; commands and engines open them with the same key."""
    from memopt.bundle import open_bundle
    from memopt.errors import ConfigurationError
    from memopt.sealing import load_key, write_key
    from memopt.weights.locked import decrypt_bundle, encrypt_bundle

    opened = open_bundle(bundle)
    if new_key:
        if key_file is None or undo:
            raise ConfigurationError("--new-key makes the file of --key-file", fix="give its path")
        write_key(key_file)
    key = load_key(key_file)
    done = decrypt_bundle(opened, key) if undo else encrypt_bundle(opened, key)
    names = [name for name, record in done.manifest.files.items() if "plain" in record]
    if as_json:
        echo(json.dumps({"path": str(done.path), "encrypted": names}))
        return
    echo(f"{len(names)} files of {done.path} are encrypted" if names else "nothing is encrypted")
