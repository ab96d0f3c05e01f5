"""The consoles every command prints through: no markup, so that `memopt[cpu]` stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def stdout(width: int = 160) -> Console:
    """Return standard output; ``width`` applies when it is not a terminal, so rows stay whole."""
    from rich.console import Console

    terminal = Console().is_terminal
    return Console(width=None if terminal else width, highlight=False, markup=False)


def stderr() -> Console:
    """Return standard error, where progress and warnings go."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
