"""OpenVINO opened such that Ctrl-C and SIGTERM still end the process, rather than crash it.

The CPU plugin of each Core puts a stack for signal handlers into the thread that loads it, and at
its end gives that thread the stack it had found. Of two Cores, the first of which ends first, that
is the first one's, freed by then, and so is it where another thread ends the Core. Python's
handlers run on that stack: the next signal is a SIGSEGV. Without one they run on the thread's own.
"""

from __future__ import annotations

import ctypes
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from memopt.extras import require

_log = logging.getLogger(__name__)
# Properties that change no answer, only how fast it comes: a plugin's own, which come and go.
_OF_SPEED = frozenset({"SNIPPETS_MODE", "CPU_RUNTIME_CACHE_CAPACITY", "ENABLE_CPU_PINNING"})


class _Stack(ctypes.Structure):
    """``stack_t`` of Linux: address, flags, bytes."""

    _fields_ = (
        ("sp", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    )


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """Leave this thread the stack for signal handlers that it has, whatever a library puts there.

    >>> with same_signal_stack():
    ...     pass
    """
    if sys.platform != "linux":  # nor does the plugin do it elsewhere
        yield
        return
    libc, before = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


def open_core() -> Any:
    """Return an ``openvino.Core`` to compile with, its CPU plugin loaded.

    Raises:
        MissingExtra: OpenVINO is not installed.
    """
    ov = require("openvino", extra="openvino", why="run OpenVINO variants")
    with same_signal_stack():
        core = ov.Core()
        core.get_versions("CPU")
    return core


def compile_known(core: Any, model: Any, device: str, options: Mapping[str, Any]) -> Any:
    """Return a compiled model, without the options of speed alone that this OpenVINO lacks.

    They were measured, and kept in the bundle, with another release; that it is opened without one
    is logged as a warning.

    Args:
        core: of :func:`open_core`.
        model: a model or the path of one.
        device: OpenVINO's name of it.
        options: its properties.

    Raises:
        RuntimeError: what openvino says of a model, a device or another option.
    """
    known = dict(options)
    while True:
        try:
            return core.compile_model(model, device, known)
        except RuntimeError as error:
            named = re.search(r"Unsupported property (\w+) ", str(error))
            if named is None or named[1] not in _OF_SPEED or known.pop(named[1], None) is None:
                raise
            _log.warning("this OpenVINO has no %s: opened without it", named[1])
