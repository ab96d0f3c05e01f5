"""What the memory commands share: their options, and how they open a store and show a memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from memopt.memory.session import Session

Store = Annotated[str, typer.Argument(help="Folder or URI of the store.")]
Text = Annotated[str | None, typer.Option("--model", help="Bundle that encodes texts.")]
Vision = Annotated[str | None, typer.Option(help="Bundle that encodes pictures.")]
Audio = Annotated[str | None, typer.Option(help="Bundle that encodes sounds.")]
Joint = Annotated[str | None, typer.Option(help="Bundle of the joint layer.")]
Key = Annotated[
    Path | None, typer.Option(help="File of the key [default: variable MEMOPT_MEMORY_KEY].")
]
Redaction = Annotated[
    str, typer.Option(help="patterns, presidio, auto, or none: what is taken out of texts.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Category = Annotated[
    list[str] | None, typer.Option("--category", help="Only these categories; repeatable.")
]
Since = Annotated[str | None, typer.Option(help="ISO time, inclusive.")]
Until = Annotated[str | None, typer.Option(help="ISO time, exclusive.")]


def open_store(
    place: str,
    *,
    create: bool = False,
    given: dict[str, str | None] | None = None,
    embed: bool = True,
    key: Path | None = None,
    redaction: str = "auto",
) -> AbstractContextManager[Session]:
    """Open a store as :func:`memopt.memory.session.open_memory` does.

    Args:
        given: the bundles of text, vision, audio and joint, by name or folder.
    """
    from memopt.memory.io.models import Models
    from memopt.memory.session import open_memory

    named = {name: _absolute(value) for name, value in (given or {}).items() if value}
    return open_memory(
        place,
        models=Models(**named),
        embed=embed,
        key=key,
        redaction=redaction,
        create=create,
        background=False,
    )


def _absolute(path: str) -> str:
    from memopt.bundle import open_bundle

    return str(open_bundle(path).path.resolve())


def moment(text: str | None, name: str) -> object:
    """Return an ISO time in UTC.

    Raises:
        ConfigurationError: it is none.
    """
    from datetime import UTC, datetime

    from memopt.errors import ConfigurationError

    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(
            f"--{name} {text!r} is no time", fix="write 2026-11-23 or 2026-11-23T10:00"
        ) from error
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def as_dict(memory: object, *, links: bool = True) -> dict[str, object]:
    """Return a memory as JSON takes it: media as their sizes, no vector."""
    document: dict[str, object] = {}
    for entry in fields(memory):  # type: ignore[arg-type]
        value = getattr(memory, entry.name)
        if entry.name == "joint_embedding" or (entry.name == "association_links" and not links):
            continue
        if isinstance(value, bytes):
            document[f"{entry.name}_bytes"] = len(value)
        elif entry.name == "association_links":
            document[entry.name] = [[link.linked_id, round(link.weight, 4)] for link in value]
        elif hasattr(value, "isoformat"):
            document[entry.name] = value.isoformat()
        elif value is not None:
            document[entry.name] = list(value) if isinstance(value, tuple) else value
    return document


def preview(memory: object, width: int = 80) -> str:
    """Return what a table shows of a memory."""
    text = getattr(memory, "text", None) or getattr(memory, "summary", None)
    if text:
        line = " ".join(text.split())
        return line if len(line) <= width else line[: width - 1] + "…"
    kinds = [name for name in ("vision_data", "audio_data") if getattr(memory, name, None)]
    sizes = [f"{name.removesuffix('_data')} {len(getattr(memory, name)):,} bytes" for name in kinds]
    return f"<{', '.join(sizes) or 'no content'}>"
