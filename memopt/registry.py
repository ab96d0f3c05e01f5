"""A registry is a visible table of strings, imported on use."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from memopt.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row of a registry: where the thing lives and what it is, in one line."""

    name: str
    target: str  # "package.module:attribute"
    summary: str
    extra: str | None = None

    def load(self) -> Any:
        """Import the module and return the attribute."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def check_keys(what: str, keys: Iterable[object], known: Iterable[str]) -> None:
    """Refuse a key that is not known.

    Raises:
        ConfigurationError: naming it, and the nearest that is.
    """
    names = list(known)
    for key in keys:
        if key not in names:
            raise ConfigurationError(
                f"{what} has unknown key {key!r}", fix=nearest(str(key), names)
            )


def check_names(what: str, given: Iterable[object], known: Collection[str]) -> None:
    """Refuse what is none of the known names.

    Raises:
        ConfigurationError: naming it, and the nearest that is.

    >>> check_names("peer", ["optimum"], ["fastembed", "optimum"])
    """
    for name in given:
        if name not in known:
            raise ConfigurationError(f"unknown {what} {name!r}", fix=nearest(str(name), known))


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return a "did you mean" sentence for an unknown ``name``, or the list of known names.

    >>> nearest("opnvino", ["cpu", "openvino"])
    "did you mean 'openvino'?"
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(names)
