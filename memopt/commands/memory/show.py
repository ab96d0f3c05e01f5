"""``memopt memory show``: one memory, with its associations or who used it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import echo, stdout
from memopt.commands.memory.options import AsJson, Key, Store
from memopt.commands.memory.shared import open_store
from memopt.visible import json_text


def show(
    store: Store,
    memory_id: Annotated[str, typer.Argument(help="Its id.")],
    save: Annotated[
        Path | None, typer.Option(help="Write text, picture and sound into this folder.")
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Also who read and wrote it.")] = False,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show one memory."""
    from rich.table import Table

    from memopt.files import atomic_path
    from memopt.memory.model.schema import as_dict
    from memopt.memory.privacy.access_log import read_log

    with open_store(store, embed=False, key=key) as here:
        memory = here.store.get(memory_id)
        lines = read_log(here.store, memory_id=memory_id) if log else []
    if save:
        save.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, content in (
            ("text.txt", memory.text.encode() if memory.text else None),
            ("image", memory.vision_data),
            ("sound.wav", memory.audio_data),
        ):
            if content is not None:
                with atomic_path(save / name, 0o600) as path:
                    path.write_bytes(content)
    document = as_dict(memory)
    if log:
        document["log"] = [
            {"at": line.at.isoformat(), "actor": line.actor, "action": line.action}
            for line in lines
        ]
    if as_json:
        echo(json_text(document))
        return
    table = Table("field", "value")
    for name, value in document.items():
        table.add_row(name, str(value))
    stdout(140).print(table)
