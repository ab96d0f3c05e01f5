"""What a child of fork() must know: sessions that its parent opened have no threads there.

fork() copies memory and the one thread that called it. A session of ONNX Runtime, OpenVINO or
torch then waits for ever for threads that are not there, when it runs and when it is freed. So in
the child nothing is asked of them again: they are kept until the process ends, and whoever uses
one is told to open its own.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any
from weakref import WeakSet

_watched: WeakSet[Any] = WeakSet()


def watch(owner: Any) -> None:
    """Have ``owner.after_fork()`` called in every child of fork(), before anything else runs."""
    _watched.add(owner)


def keep_for_ever(thing: object) -> None:
    """Never free ``thing``: its destructor would wait for threads that are not there."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _tell() -> None:
    for owner in list(_watched):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell)
