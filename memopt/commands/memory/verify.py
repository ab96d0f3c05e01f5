"""``memopt memory verify``: is everything there, once, readable?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import echo, stdout
from memopt.commands.memory.options import AsJson, Key, Store
from memopt.commands.memory.shared import open_store


def verify(
    store: Store,
    expect: Annotated[
        Path | None, typer.Option(help="File of ids that must be there, one a line.")
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Drop broken links first.")] = False,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Read every memory and link; exit 1 when something is wrong."""
    from rich.table import Table

    from memopt.memory.lifecycle.verify import verify as run
    from memopt.records import decoded_lines

    expected: list[str] = []
    if expect:
        with expect.open("rb") as file:
            expected = [word for line in decoded_lines(file, str(expect)) for word in line.split()]
    with open_store(store, embed=False, key=key) as here:
        report = run(here.store, expected, repair=repair)
    if as_json:
        echo(json.dumps({**asdict(report), "problems": report.problems}, indent=1))
    else:
        table = Table("problem", "how many")
        for name, count in report.problems.items():
            table.add_row(name.replace("_", " "), str(count))
        stdout().print(
            table if report.problems else f"{report.memories} memories, nothing is wrong"
        )
    if report.problems:
        raise typer.Exit(1)
