"""``memopt memory export``: the three interchange files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import echo, stderr, stdout
from memopt.commands.memory.options import AsJson, Key, Store
from memopt.commands.memory.shared import open_store


def export(
    store: Store,
    folder: Annotated[Path, typer.Argument(help="Where the files go; made when absent.")],
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Write memories.parquet, associations.parquet and long_term.parquet, in plain."""

    with stderr().status("export"), open_store(store, embed=False, key=key) as here:
        done = here.store.export_parquet(folder)
    if as_json:
        echo(json.dumps(asdict(done)))
        return
    stdout().print(
        f"{done.memories} memories, {done.linked} with links, {done.long_term} long-term: {folder}"
    )
