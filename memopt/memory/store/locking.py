"""One writer at a time on a local store, over processes and threads; readers never wait."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from memopt.errors import ConsolidationError
from memopt.files import open_plain

LOCK_FILE = ".lock"
READ_FILE = ".reading"
# A commit takes milliseconds, compaction seconds; a minute of waiting is a stuck process.
PATIENCE = 120.0
_FIRST_WAIT, _LONGEST_WAIT = 0.001, 0.02
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


class ReadOnlyError(ConsolidationError):
    """The store may only be read, by this user or at this place."""


_LOCKS: dict[Path, WriterLock] = {}
_LOCKS_GUARD = threading.Lock()
# Of every lock file that is open now.
_DESCRIPTORS: dict[object, int] = {}


def lock_of(folder: Path) -> WriterLock:
    """Return the one lock this process has for a folder, so that two open stores can nest.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> lock_of(folder) is lock_of(folder / ".")
    True
    """
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(folder.resolve(), WriterLock(folder.resolve()))


class WriterLock:
    """A re-entrant lock held by one thread of one process at a time.

    The operating system gives the lock back when its holder dies, so a crash never leaves it
    behind.

    >>> import tempfile
    >>> lock = WriterLock(Path(tempfile.mkdtemp()))
    >>> with lock.held(), lock.held():
    ...     pass
    """

    def __init__(self, folder: Path, patience: float = PATIENCE) -> None:
        self._path = folder / LOCK_FILE
        self._patience = patience
        self._thread = threading.RLock()
        self._depth = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock for the length of the block.

        Raises:
            ReadOnlyError: the store may only be read.
            ConsolidationError: another process kept the lock longer than ``patience`` seconds.
        """
        if not self._thread.acquire(timeout=self._patience):
            raise self._stuck()
        try:
            # The outermost block has locked the file for those in it.
            with nullcontext() if self._depth else self._locked_file():
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1
        finally:
            self._thread.release()

    @contextmanager
    def _locked_file(self) -> Iterator[None]:
        try:
            descriptor = open_plain(self._path)
        except OSError as error:
            kind = ReadOnlyError if error.errno in _NOT_ALLOWED else ConsolidationError
            raise kind(
                f"{self._path} cannot be opened ({error.strerror})",
                fix="write as a user who may change the store",
            ) from error
        with _closing(descriptor):
            deadline, pause = time.monotonic() + self._patience, _FIRST_WAIT
            while not _try_lock(descriptor):
                if time.monotonic() > deadline:
                    raise self._stuck()
                time.sleep(pause)
                pause = min(pause * 2, _LONGEST_WAIT)
            yield

    def _stuck(self) -> ConsolidationError:
        return ConsolidationError(
            f"{self._path} has been held by another writer for {self._patience:.0f} s",
            fix="end the process that hangs; its lock is freed with it",
        )


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    """Close a lock file after the block, which gives the lock back."""
    token = object()
    _DESCRIPTORS[token] = descriptor
    try:
        yield descriptor
    finally:
        # In a child that was forked in the block it is closed already.
        mine = _DESCRIPTORS.pop(token, None)
        if mine is not None:
            os.close(mine)


def _forget_after_fork() -> None:
    """In a child: give up the locks of the parent, which a copy of a descriptor keeps taken.

    The threads that held them are not here, so nobody would give them back while the child lives.
    """
    global _LOCKS_GUARD
    _LOCKS_GUARD = threading.Lock()
    _LOCKS.clear()
    for descriptor in _DESCRIPTORS.values():
        os.close(descriptor)
    _DESCRIPTORS.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep the files of the present version for the length of the block.

    Any number of threads and processes at once; given back by the kernel when one dies. In a folder
    that cannot be written nobody deletes anything either.
    """
    try:
        descriptor = open_plain(folder / READ_FILE)
    except OSError:
        yield
        return
    with _closing(descriptor):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield


@contextmanager
def unless_read(folder: Path) -> Iterator[bool]:
    """Yield whether no :func:`reading` block is under way; then none begins in this block.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with reading(folder), unless_read(folder) as unread:
    ...     unread
    False
    >>> with unless_read(folder) as unread:
    ...     unread
    True
    """
    with _closing(open_plain(folder / READ_FILE)) as descriptor:
        yield _try_lock(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
