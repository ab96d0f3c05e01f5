"""``memopt config show|check|init``: the settings in force, a check of a file, a fresh file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from memopt.commands.console import echo

app = typer.Typer(help="Show, check or write the settings.", no_args_is_help=True)

FileOption = Annotated[
    Path | None, typer.Option("--file", "-f", help="YAML file [default: ./memopt.yaml if there].")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value; wins over everything.")
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _merge(assignments: list[str] | None) -> dict[str, Any]:
    from memopt.config import parse_assignment

    merged: dict[str, Any] = {}
    for text in assignments or []:
        for section, keys in parse_assignment(text).items():
            merged.setdefault(section, {}).update(keys)
    return merged


@app.command()
def show(
    file: FileOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print every setting in force and where it is from: file, then environment, then --set.

    What is not in force is a comment that says what is instead, with --json null.
    """
    from memopt.config import in_force, load_config, origins

    given = _merge(assignments)
    config = load_config(file, given)
    if as_json:
        document = config.model_dump(mode="json")
        for section, values in document.items():
            values.update(dict.fromkeys(getattr(config, section).idle()))
        echo(json.dumps(document, indent=1))
    else:
        echo(in_force(config, origins(file, given)), nl=False)


@app.command()
def check(
    file: FileOption = None, assignments: SetOption = None, as_json: JsonOption = False
) -> None:
    """Say whether the settings are valid; exit 2 and name the key when they are not."""
    from memopt.config import config_file, load_config

    load_config(file, _merge(assignments))
    read = config_file(file)
    if as_json:
        echo(json.dumps({"valid": True, "file": str(read) if read else None}))
    else:
        echo(f"the settings are valid ({read or 'no file: defaults and environment'})")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("memopt.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a file of every setting, its default and what it allows, all commented out."""
    from memopt.config import template
    from memopt.errors import ConfigurationError
    from memopt.files import atomic_path

    if path.exists() and not force:
        raise ConfigurationError(f"{path} exists", fix="choose another name or add --force")
    with atomic_path(path) as temporary:
        temporary.write_text(template(), encoding="utf-8")
    echo(json.dumps({"file": str(path)}) if as_json else f"wrote {path}")
