"""Import an optional dependency at the moment it is needed, or say how to get it."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
            f"{top} is needed to {why} and is not installed", fix=f"run: {pip_command(extra)}"
        ) from error


@contextmanager
def root_log_kept() -> Iterator[None]:
    """Keep a library's lines in the root logger out, and undo what it changes there.

    OpenVINO's converter sets the root logger to ERROR and, where it refuses a graph, leaves it so:
    all warnings of the process would be gone. What other loggers say meanwhile comes through unless
    the library stops it.

    >>> import logging
    >>> with root_log_kept():
    ...     logging.getLogger().setLevel("ERROR")
    >>> logging.getLevelName(logging.getLogger().level)
    'WARNING'
    """
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    root.addFilter(lambda record: False)  # asked only of what is logged at the root itself
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


def pip_command(*extras: str) -> str:
    """Return the command that adds ``extras`` to this installation, from where it came.

    A checkout or a wheel that memopt was installed from is named as long as it is there: on a
    machine whose index does not have memopt it is the only command that works.

    >>> pip_command("cpu", "media").endswith("[cpu,media]'")
    True
    """
    source, editable = _origin()
    wanted = f"'{source or 'memopt'}[{','.join(extras)}]'"
    return f"{_pip()} install {'-e ' if editable else ''}{wanted}"


def _pip() -> str:
    if importlib.util.find_spec("pip") is None:
        return "uv pip"
    # Whichever `pip` comes first on the PATH may be another Python's.
    return "pip" if os.environ.get("VIRTUAL_ENV") == sys.prefix else f"{sys.executable} -m pip"


def _origin() -> tuple[str | None, bool]:
    """Return the folder or wheel memopt was installed from, and whether it is run from there."""
    import json
    from importlib import metadata
    from pathlib import Path
    from urllib.parse import unquote, urlsplit

    try:
        text = metadata.distribution("memopt").read_text("direct_url.json")
        record = json.loads(text) if text else {}
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return None, False
    url = urlsplit(str(record.get("url", "")))
    path = unquote(url.path)
    if url.scheme != "file" or not Path(path).exists():
        return None, False
    return path, bool((record.get("dir_info") or {}).get("editable"))
