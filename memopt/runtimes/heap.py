"""Giving memory back to the system that a runtime took for a while: glibc and Linux only."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

_DONTNEED = 4  # of madvise(2), from <linux/mman.h>


@cache
def _libc() -> Any:
    """Return the C library with malloc_trim, None where there is none (musl, macOS, Windows)."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None


def trim_heap() -> None:
    """Give back what was freed: glibc keeps it, in an arena a thread, and a graph being compiled
    leaves several megabytes behind.

    >>> trim_heap()
    """
    if _libc() is not None:
        _libc().malloc_trim(ctypes.c_size_t(0))


def drop_pages(path: Path) -> None:
    """Take the pages of a file that this process has mapped out of its resident memory.

    They stay in the system's cache, and what is read again comes back from there. For weights that
    a runtime read once, to pack them. Only mappings that cannot be written are touched.

    Args:
        path: a file that may be mapped.

    >>> drop_pages(Path("/nowhere"))
    """
    if _libc() is None or not path.is_file():
        return
    name = str(path.resolve())
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        span, mode, _, _, _, *rest = line.split(maxsplit=5)
        if rest != [name] or "w" in mode:
            continue
        start, stop = (int(edge, 16) for edge in span.split("-"))
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _DONTNEED)
