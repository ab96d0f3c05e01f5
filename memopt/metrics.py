"""Counters every part may raise; exported through prometheus-client when that is installed."""

from __future__ import annotations

import threading
from collections import Counter

_lock = threading.Lock()
_counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()


def count(name: str, amount: int = 1, **labels: str) -> None:
    """Add ``amount`` to the counter ``name`` with these labels; safe from any thread.

    >>> count("memopt_example_total", kind="doc")
    >>> value("memopt_example_total", kind="doc")
    1
    """
    with _lock:
        _counts[name, tuple(sorted(labels.items()))] += amount


def value(name: str, **labels: str) -> int:
    """Return the counter's value, 0 when it was never raised."""
    with _lock:
        return _counts[name, tuple(sorted(labels.items()))]
