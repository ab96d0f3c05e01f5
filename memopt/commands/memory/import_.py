"""``memopt memory import``: what export wrote."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import echo, stderr, stdout
from memopt.commands.memory.options import AsJson, Key, Redaction, Store
from memopt.commands.memory.shared import open_store


def import_(
    store: Store,
    folder: Annotated[Path, typer.Argument(help="Folder of an export.")],
    key: Key = None,
    redaction: Redaction = "auto",
    as_json: AsJson = False,
) -> None:
    """Add the memories, links and summaries of an export; those that are there stay as they are."""
    from memopt.memory.io.imports import check_export
    from memopt.memory.memory_store import MemoryStore
    from memopt.memory.privacy.keys import read_cipher
    from memopt.memory.store.creation import unmade_on_error

    with unmade_on_error(store), stderr().status("import"):
        dim = check_export(folder)
        with MemoryStore(store, dim=dim, cipher=read_cipher(key)):
            pass  # made with the dimension of the export when it is new
        with open_store(store, embed=False, key=key, redaction=redaction) as here:
            with here.store.observers.without(here.graph):  # the links come from the file
                done = here.store.import_parquet(folder)
            here.store.index.ensure()
    if as_json:
        echo(json.dumps({"added": done.memories, **asdict(done)}))
        return
    stdout().print(
        f"{done.memories} added, {done.long_term} of them long-term, {done.already} there already; "
        f"links of {done.linked}"
    )
    left_out = {"expired memories": done.expired, "links without an end": done.dangling}
    if any(left_out.values()):
        lines = ", ".join(f"{count} {name}" for name, count in left_out.items() if count)
        stdout().print(f"left out: {lines}")
    if done.differing:
        stderr().print(f"warning: {done.differing} ids hold other content, which stays")
