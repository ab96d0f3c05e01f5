"""``memopt memory``: a durable, private memory over text, pictures and sound."""

from __future__ import annotations

import importlib

import typer

# One module per command, each with a function of that name (train-joint: train_joint).
MEMORY_COMMANDS: tuple[str, ...] = (
    "add",
    "search",
    "show",
    "forget",
    "stats",
    "consolidate",
    "worker",
    "mcp",
    "train_joint",
    "export",
    "import_",
    "verify",
    "reembed",
    "rekey",
)

app = typer.Typer(
    help="Keep what was read, seen and heard, and find it again from any of the three.",
    no_args_is_help=True,
)

for _name in MEMORY_COMMANDS:
    _module = importlib.import_module(f"memopt.commands.memory.{_name}")
    app.command(_name.rstrip("_").replace("_", "-"))(getattr(_module, _name))
