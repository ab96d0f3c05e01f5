"""Parameters of tests that would take too long all together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Return the values with all but ``fast`` left to ``make test-all``."""
    return [v if v in fast else pytest.param(v, marks=pytest.mark.slow) for v in values]
