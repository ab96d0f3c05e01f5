"""Who is told what happens to the memories of an open store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

import numpy as np
from numpy.typing import NDArray


class StoreObserver:
    """What follows a store: it is told what happens, and overrides what it wants to know."""

    def added(
        self, ids: Sequence[str], vectors: NDArray[np.float32], timestamps: Sequence[datetime]
    ) -> None:
        """Rows were committed; called after the commit, outside the writer lock."""

    def deleting(self, ids: Sequence[str]) -> None:
        """Rows are about to be deleted; called inside the writer lock, before the commit."""

    def accessed(self, action: str, ids: Sequence[str]) -> None:
        """Memories were 'read', 'write'-ten, 'delete'-d or 'export'-ed."""

    def changed(self) -> None:
        """Some table was written; called outside the writer lock."""

    def closing(self) -> None:
        """The store closes: write what is buffered, wait for what is under way."""


class Observers:
    """The observers of one store, told in the order they came and closed in the opposite one."""

    def __init__(self) -> None:
        self._all: list[StoreObserver] = []

    def __iter__(self) -> Iterator[StoreObserver]:
        return iter(list(self._all))

    def add(self, observer: StoreObserver) -> None:
        """Tell it too, from now on."""
        self._all.append(observer)

    def remove(self, observer: StoreObserver) -> None:
        """Tell it no more; without effect where it is not told."""
        if observer in self._all:
            self._all.remove(observer)

    @contextmanager
    def without(self, observer: StoreObserver) -> Iterator[None]:
        """Tell it nothing of what happens in the block."""
        self.remove(observer)
        try:
            yield
        finally:
            self.add(observer)

    def added(
        self, ids: Sequence[str], vectors: NDArray[np.float32], timestamps: Sequence[datetime]
    ) -> None:
        """Tell of new rows."""
        for observer in self if ids else ():
            observer.added(ids, vectors, timestamps)

    def deleting(self, ids: Sequence[str]) -> None:
        """Tell of rows about to go."""
        for observer in self:
            observer.deleting(ids)

    def accessed(self, action: str, ids: Sequence[str]) -> None:
        """Tell who was read, written, deleted or exported."""
        for observer in self if ids else ():
            observer.accessed(action, ids)

    def changed(self) -> None:
        """Tell of a write."""
        for observer in self:
            observer.changed()

    def closing(self) -> None:
        """Tell that the store closes; what came last may still write into what came first."""
        for observer in reversed(self._all):
            observer.closing()
