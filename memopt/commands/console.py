"""The consoles every command prints through: no markup, so that `memopt[cpu]` stays as it is."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

EVERY_SECONDS = 5.0


def stdout(width: int = 160) -> Console:
    """Return standard output; ``width`` applies when it is not a terminal, so rows stay whole."""
    from rich.console import Console

    terminal = Console().is_terminal
    return Console(width=None if terminal else width, highlight=False, markup=False)


def stderr() -> Console:
    """Return standard error, where progress and warnings go."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def steps(first: str) -> Iterator[Callable[[str], None]]:
    """Yield ``say(line)``: a status on a terminal, else lines on standard error.

    A log shall show that work goes on, not each of a hundred rounds, and a command of a second
    nothing but its answer: every few seconds the newest line is written, if it is a new one.
    """
    console = stderr()
    if console.is_terminal:
        with console.status(first) as status:
            yield status.update
        return
    newest, ended = [first], threading.Event()

    def tell() -> None:
        told = ""
        while not ended.wait(EVERY_SECONDS):
            if newest[0] != told:
                told = newest[0]
                console.print(told)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield lambda line: newest.__setitem__(0, line)
    finally:
        ended.set()
        teller.join()


def check_target(path: Path, *, folder: bool = False) -> None:
    """Refuse a file (or folder) that could not be written, before the work that fills it.

    Raises:
        ConfigurationError: it is of the other kind, or there is no way to make it.
    """
    from memopt.errors import ConfigurationError

    if path.exists() and path.is_dir() != folder:
        kind = "a folder" if path.is_dir() else "a file"
        raise ConfigurationError(f"{str(path)!r} is {kind}", fix="give another path")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    inside = parent if parent.is_dir() else parent.parent
    if (parent != path and not parent.is_dir()) or not os.access(inside, os.W_OK):
        raise ConfigurationError(f"{str(path)!r} cannot be written", fix="give another path")
