"""Write docs/cli.md, the command reference, from the commands themselves.

python docs/make_cli.py [--check]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "100"
os.environ["NO_COLOR"] = "1"

# The checkout that this file lies in, not what happens to be installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

from typer.main import get_command
from typer.testing import CliRunner

from memopt.cli import COMMANDS, app

TARGET = Path(__file__).with_name("cli.md")


def main() -> None:
    """Print every command's --help into one page; with --check only compare."""
    group = get_command(app)
    parts = ["# Command reference", "", "Written by `docs/make_cli.py`; do not edit."]
    for name in COMMANDS:
        parts += ["", f"## memopt {name}", *_help(name)]
        inner = getattr(group.commands[name], "commands", {})  # type: ignore[attr-defined]
        for subcommand in inner:
            parts += ["", f"### memopt {name} {subcommand}", *_help(name, subcommand)]
    text = "\n".join(parts) + "\n"
    if "--check" in sys.argv:
        if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
            sys.exit("docs/cli.md is out of date; run: python docs/make_cli.py")
    else:
        TARGET.write_text(text, encoding="utf-8")


def _help(*command: str) -> list[str]:
    result = CliRunner().invoke(app, [*command, "--help"], prog_name="memopt")
    lines = [line.rstrip() for line in result.output.strip().splitlines()]
    return ["", "```text", *lines, "```"]


if __name__ == "__main__":
    main()
