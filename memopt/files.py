"""Files that are either whole or not there: write beside, flush, rename into place."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import BinaryIO

from memopt.errors import ConfigurationError

# 1 MiB reads keep hashing bound by SHA-256 itself, not by system calls.
_HASH_CHUNK = 1 << 20
_STAGING = ".staging-"
# Bytes of one name on every usual file system, and of a path that leaves room for its folder's.
_LONGEST_NAME, _LONGEST_PATH = 255, 1024


@contextmanager
def atomic_path(target: Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary path in ``target``'s folder; rename it onto ``target`` on success.

    On any exception, Ctrl-C and a full disk included, the temporary file is removed and the
    old ``target`` is left as it was.

    Args:
        target: replaced where it is a link, never followed.
        mode: who may read the file, before the umask; 0o600 for what is its owner's alone.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with atomic_path(folder / "a.txt") as path:
    ...     _ = path.write_text("whole")
    >>> (folder / "a.txt").read_text()
    'whole'
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.{secrets.token_hex(8)}.part"
    # Made with these bits the kernel takes off what the umask says. Asking for the umask means
    # setting it, for the files of other threads too.
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    try:
        yield path
        sync(path)
        path.replace(target)
        sync(target.parent)
    finally:
        path.unlink(missing_ok=True)


def stays_below(name: object) -> bool:
    """Tell whether a name that a file states can only be a place below the folder it is joined to.

    What it names need not be there; but asking the system for it raises nothing.

    >>> [stays_below(name) for name in ("1_Pooling", "a/b", "../a", "/a", "a\\0", "a" * 999)]
    [True, True, False, False, False, False]
    """
    if not isinstance(name, str) or "\0" in name:
        return False
    try:
        parts = [part.encode() for part in PurePath(name).parts]
    except UnicodeEncodeError:
        return False
    return (
        not PurePath(name).is_absolute()
        and b".." not in parts
        and all(len(part) <= _LONGEST_NAME for part in parts)
        and sum(map(len, parts)) <= _LONGEST_PATH
    )


def open_plain(path: Path, flags: int = os.O_RDWR | os.O_CREAT, mode: int = 0o600) -> int:
    """Open a file that is ours alone, such as a lock; return its descriptor.

    Whoever may write into the folder could have put a link there, so that we lock, read or write
    another file instead.

    Args:
        mode: of a file that is made.

    Raises:
        ConfigurationError: there is a link, a folder, a pipe or a device of that name.
        OSError: it cannot be opened.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> (folder / "lock").symlink_to(folder / "other")
    >>> open_plain(folder / "lock")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: ...lock is a link, not a plain file; delete it
    """
    try:
        # Without O_NONBLOCK a pipe that somebody put there would be waited for.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            what = "a link" if error.errno == errno.ELOOP else "a folder"
            raise ConfigurationError(
                f"{path} is {what}, not a plain file", fix="delete it"
            ) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigurationError(f"{path} is no plain file", fix="delete it")
    return descriptor


def lock_plain(path: Path) -> BinaryIO | None:
    """Open a file that is ours alone and lock it until it is closed; None where another has it.

    Raises:
        ConfigurationError, OSError: as :func:`open_plain`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "lock"
    >>> with lock_plain(path) as first:
    ...     lock_plain(path) is None
    True
    """
    file = os.fdopen(open_plain(path), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def read_plain(path: Path) -> bytes | None:
    """Return the bytes of a file that is ours alone; None where there is none.

    Raises:
        ConfigurationError: there is a link, a folder, a pipe or a device of that name.

    >>> read_plain(Path("no/such/file")) is None
    True
    """
    try:
        descriptor = open_plain(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


@contextmanager
def staged_directory(parent: Path) -> Iterator[Path]:
    """Yield an empty folder inside ``parent`` that is always removed at the end.

    Write several files into it, check them, then :func:`publish` those that belong together. What
    a process that was killed (SIGKILL, power) left behind is removed by the next one.

    >>> import tempfile, pathlib
    >>> parent = pathlib.Path(tempfile.mkdtemp())
    >>> (parent / ".staging-of-a-killed-process").mkdir()
    >>> with staged_directory(parent) as folder:
    ...     len(list(parent.iterdir()))
    1
    """
    parent = Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{_STAGING}*"):
        with _locked(left) as owner_is_gone:
            if owner_is_gone:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=parent))
        with _locked(folder) as ours:
            # Another process may have taken it for an abandoned one before it was locked.
            if ours is False or not folder.is_dir():
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Lock a folder; yield whether nobody else has, None where the file system cannot tell.

    The kernel gives a lock back when its process ends, however it ends.
    """
    free: bool | None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:
            free = None
        yield free
    finally:
        os.close(descriptor)


def publish(staged: Path, target: Path) -> None:
    """Flush ``staged`` (a file on the same file system) and rename it onto ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sync(staged)
    staged.replace(target)
    sync(target.parent)


@contextmanager
def swapped_in(files: Mapping[Path, Path], committed: Callable[[], bool]) -> Iterator[None]:
    """Rename finished files into place, and put back what was there if the block raises.

    Args:
        files: target -> finished file, on the same file system; the order is kept.
        committed: asked when the block raises: whether it had already done what makes the new files
            the right ones, in which case they stay.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> old, new = folder / "a.txt", folder / "new.txt"
    >>> old.write_text("old"), new.write_text("new")
    (3, 3)
    >>> with swapped_in({old: new}, committed=lambda: False):
    ...     raise OSError("disk full")
    Traceback (most recent call last):
    ...
    OSError: disk full
    >>> old.read_text(), [path.name for path in folder.iterdir()]
    ('old', ['a.txt'])
    """
    for target, file in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        sync(file)
    kept = {
        target: file.with_name(f".{file.name}.old")
        for target, file in files.items()
        if target.is_file()
    }
    begun: list[Path] = []
    try:
        for target, old in kept.items():
            _second_name(target, old)
        for target, file in files.items():
            begun.append(target)
            file.replace(target)
        for folder in {target.parent for target in files}:
            sync(folder)
        yield
    except BaseException:
        if not committed():
            for target in begun:
                if target in kept:
                    kept[target].replace(target)
                else:
                    target.unlink(missing_ok=True)
        raise
    finally:
        for old in kept.values():
            old.unlink(missing_ok=True)


def _second_name(path: Path, name: Path) -> None:
    """Keep a file's bytes under another name, also where a file system has no hard links."""
    try:
        name.hardlink_to(path)
    except OSError:
        shutil.copy2(path, name)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
