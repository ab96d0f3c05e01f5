"""``memopt memory export``: the three interchange files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.memory.opened import Key, Store


def export(
    store: Store,
    folder: Annotated[Path, typer.Argument(help="Where the files go; made when absent.")],
    key: Key = None,
) -> None:
    """Write memories.parquet, associations.parquet and long_term.parquet, in plain."""
    from memopt.commands.console import stdout
    from memopt.commands.memory.opened import opened
    from memopt.memory.interchange import export_parquet

    with opened(store, embed=False, key=key) as here:
        done = export_parquet(here.store, folder)
    stdout().print(
        f"{done.memories} memories, {done.linked} with links, {done.long_term} long-term: {folder}"
    )
