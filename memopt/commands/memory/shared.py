"""How the memory commands open a store, read a time and show a memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from memopt.commands.console import progress
from memopt.errors import ConfigurationError

if TYPE_CHECKING:
    from memopt.memory.io.models import Models
    from memopt.memory.model.schema import Memory
    from memopt.memory.session import Session


def open_store(
    place: str, *, create: bool = False, **options: Any
) -> AbstractContextManager[Session]:
    """Open a store as :func:`memopt.memory.open_memory` does, with its ``options``."""
    from memopt.memory.session import open_memory

    return open_memory(place, create=create, background=False, **options)


def bundles(**names: str | None) -> Models:
    """Return the bundles of text, vision, audio and joint, each by name or folder."""
    from memopt.bundle import open_bundle
    from memopt.memory.io.models import Models

    return Models(**{k: str(open_bundle(v).path.resolve()) for k, v in names.items() if v})


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what takes how much is done, of how much: a bar on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn

    with progress(what, BarColumn(), MofNCompleteColumn()) as step:
        yield lambda done, total: step(completed=done, total=total)


def moment(text: str | None, name: str) -> datetime | None:
    """Return an ISO time in UTC.

    Raises:
        ConfigurationError: it is none.
    """
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(
            f"--{name} {text!r} is no time", fix="write 2026-11-23 or 2026-11-23T10:00"
        ) from error
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def preview(memory: Memory, width: int = 80) -> str:
    """Return what a table shows of a memory."""
    if text := memory.text or memory.summary:
        line = " ".join(text.split())
        return line if len(line) <= width else line[: width - 1] + "…"
    media = {"vision": memory.vision_data, "audio": memory.audio_data}
    sizes = [f"{name} {len(data):,} bytes" for name, data in media.items() if data]
    return f"<{', '.join(sizes) or 'no content'}>"
