"""Whose turn it is to write: an engine has one cache, so it writes one text at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from memopt.errors import ConfigurationError

# How soon one that waits sees that it is cancelled.
_LOOK = 0.05


class TextTurn:
    """A lock for which threads wait, but never a thread for a text that it has to read on itself.

    Attributes:
        reader: the thread that reads the text of now, None between texts.

    >>> turn = TextTurn()
    >>> with turn.taken(), turn.taken():
    ...     pass
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: a stream of this engine is not at its end; \
read it to its end or close() it, or open a second engine
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reader: int | None = None

    @contextmanager
    def taken(
        self, reader: int | None = None, cancel: threading.Event | None = None
    ) -> Iterator[bool]:
        """Wait for the turn and hold it; give False where ``cancel`` was set before it came.

        Args:
            reader: the thread that will read the text; None is the one of now.
            cancel: ends the waiting.

        Raises:
            ConfigurationError: this thread is in the middle of a text: it would wait for ever.
        """
        if not self._wait(cancel):
            yield False
            return
        self.reader = reader or threading.get_ident()
        try:
            yield True
        finally:
            self.reader = None
            self._lock.release()

    def locked(self) -> bool:
        """Say whether a text is being written."""
        return self._lock.locked()

    def _wait(self, cancel: threading.Event | None) -> bool:
        if self._lock.acquire(blocking=False):
            return True
        if self.reader == threading.get_ident():
            raise ConfigurationError(
                "a stream of this engine is not at its end",
                fix="read it to its end or close() it, or open a second engine",
            )
        while not self._lock.acquire(timeout=-1 if cancel is None else _LOOK):
            if cancel is not None and cancel.is_set():
                return False
        return True
