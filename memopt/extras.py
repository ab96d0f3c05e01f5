"""Import an optional dependency at the moment it is needed, or say how to get it."""

from __future__ import annotations

import importlib
from typing import Any

from memopt.errors import MissingExtra


def require(module: str, *, extra: str, why: str) -> Any:
    """Import and return ``module``, which the ``extra`` brings.

    Args:
        module: dotted module name.
        extra: the pip extra of memopt that installs it.
        why: what needs it, to finish the sentence "... is needed to <why>".

    Raises:
        MissingExtra: the top-level package of ``module`` is not installed. A module missing
            *inside* an installed package is a broken install and is raised as it is.

    >>> require("json", extra="cpu", why="read JSON").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        raise MissingExtra(
            f"{top} is needed to {why} and is not installed",
            fix=f"run: pip install 'memopt[{extra}]'",
        ) from error
