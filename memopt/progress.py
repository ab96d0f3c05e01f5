"""How work tells what goes on: a line before each step, or how many of how many are done."""

from __future__ import annotations

from collections.abc import Callable

Step = Callable[[str], None]
Progress = Callable[[int, int], None]


def silent(*_: object) -> None:
    """Tell nobody."""
