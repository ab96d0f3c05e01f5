"""What the scripts here accept as numbers, and the one line they say when they cannot go on."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import TypeVar

from memopt.errors import MemoptError

N = TypeVar("N", int, float)


def positive_int(text: str) -> int:
    """Read a whole number of at least 1: the ``type`` of rounds, sizes and threads."""
    return _number(text, int, 1, "a whole number of at least 1")


def nonnegative_int(text: str) -> int:
    """Read a whole number of at least 0, where 0 leaves a measurement out."""
    return _number(text, int, 0, "a whole number of at least 0")


def positive_float(text: str) -> float:
    """Read a number above 0: seconds, or a rate."""
    return _number(text, float, sys.float_info.min, "a number above 0")


def nonnegative_float(text: str) -> float:
    """Read a number of at least 0, where 0 leaves a measurement out."""
    return _number(text, float, 0, "a number of at least 0")


def run_main(main: Callable[[], None]) -> None:
    """Run a script's ``main``; what memopt refuses, and a file that is not there, is one line.

    The exit code is what the command ``memopt`` would give: 1, or 2 for a wrong setting.
    """
    try:
        main()
    except MemoptError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if not error.filename:
            raise
        _fail(f"{error.strerror} ({error.filename}); give another path", 1)


def _number(text: str, kind: Callable[[str], N], least: float, wanted: str) -> N:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not least <= number < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not {wanted}")
    return number


def _fail(problem: str, code: int) -> None:
    print(f"error: {' '.join(problem.split())}", file=sys.stderr)
    sys.exit(code)
