"""The one way every command prints: no markup, so that `memopt[cpu]` stays as it is.

What is printed was written by others: a memory, a file's name, a node's. A terminal obeys some of
its characters (another title, a cleared screen, a line written over), so these are shown instead.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from memopt.visible import visible

if TYPE_CHECKING:
    from rich.console import Console

    from memopt.progress import Step

EVERY_SECONDS = 5.0


def echo(text: object, *, err: bool = False, nl: bool = True) -> None:
    """Print one text as :func:`visible` shows it, not wrapped."""
    typer.echo(visible(str(text)), err=err, nl=nl)


@cache
def _console_class() -> type[Console]:
    # rich takes 50 ms to import, so its class is made when something is printed.
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

    class VisibleConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            # Here, so that columns are as wide as what is shown.
            return super().render_str(visible(text), **options)

        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            # A status and a bar make their texts themselves; rich's own controls are marked.
            for part in super().render(renderable, options):
                text = part.text if part.control else visible(part.text)
                yield part if text == part.text else Segment(text, part.style)

    return VisibleConsole


def stdout(width: int = 160) -> Console:
    """Return standard output; ``width`` applies when it is not a terminal, so rows stay whole."""
    made = _console_class()
    terminal = made().is_terminal
    return made(width=None if terminal else width, highlight=False, markup=False)


def stderr() -> Console:
    """Return standard error, where progress and warnings go."""
    return _console_class()(stderr=True, highlight=False, markup=False, soft_wrap=True)


def say(line: str) -> None:
    """Print one line on standard error: what goes on, beside the command's answer."""
    echo(line, err=True)


@contextmanager
def steps(first: str) -> Iterator[Step]:
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


@contextmanager
def progress(
    *columns: Any, total: float | None = None, transient: bool = False, **fields: Any
) -> Iterator[Callable[..., None]]:
    """Yield what takes how far the work is: ``completed=``, ``total=``, ``advance=`` or fields.

    Args:
        columns: of a bar of rich, shown on a terminal's standard error; a text is filled in with
            ``{task}``.
        total: how much there is to do, where that is known.
        transient: take it away at the end.
        fields: what the columns show besides, at first.
    """
    from rich.progress import Progress

    console = stderr()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=transient) as bar:
        yield partial(bar.update, bar.add_task("", total=total, **fields))


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
