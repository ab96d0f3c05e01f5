"""``memopt doctor``: which providers work here, what the processor can do, what is in conflict."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from memopt.commands.console import echo


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try every provider and print what this machine offers; exit 1 when wheels are in conflict."""
    from rich.table import Table

    from memopt.commands.console import stdout
    from memopt.runtimes.cpu import lacking
    from memopt.runtimes.doctor import diagnose

    found = diagnose()
    if as_json:
        echo(json.dumps(asdict(found), indent=1))
        raise typer.Exit(1 if found.conflicts else 0)
    console = stdout(160)
    providers = Table("provider", "usable", "what answered, or why not", "runs on")
    for status in found.providers:
        usable = "yes" if status.usable else "no"
        providers.add_row(status.name, usable, status.detail, status.summary)
    console.print(providers)
    machine = Table("machine", "")
    machine.add_row("processor", found.cpu)
    machine.add_row("has", ", ".join(found.features) or "nothing known")
    machine.add_row("lacks", ", ".join(lacking()) or "nothing of note")
    machine.add_row("cores", f"{found.cores} usable of {found.cores_of_machine}")
    limit = f", limited to {found.memory_limit_mb:,} MB" if found.memory_limit_mb else ""
    machine.add_row(
        "memory",
        f"{found.memory_available_mb:,} MB free of {found.memory_total_mb:,} MB{limit}",
    )
    for name, version in found.versions.items():
        machine.add_row(name, version)
    console.print(machine)
    for conflict in found.conflicts:
        console.print(f"conflict: {conflict.problem}\n  {conflict.fix}", style="red")
    if found.conflicts:
        raise typer.Exit(1)
