"""Unfinished uploads: one file each, named by what is being uploaded, so that it can resume."""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memopt.federation.failures import SyncFailure
from memopt.federation.limits import Limits
from memopt.federation.server.store import storage
from memopt.federation.trust.manifest import VersionManifest
from memopt.federation.trust.vault import Appending, Vault


class _Holder:
    """Who writes a file now; taking it over waits for a write that is under way."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.token: object = None


class Upload:
    """One upload held by one exchange; a newer exchange for the same upload takes it over."""

    def __init__(self, path: Path, total: int, holder: _Holder, vault: Vault) -> None:
        self.path = path
        self._holder = holder
        self._token = object()
        with holder.lock:
            holder.token = self._token
            self._file = Appending(path, vault)
            if self.size > total:
                self._file.clear()

    @property
    def size(self) -> int:
        """How many bytes are there."""
        return self._file.size

    def append(self, data: memoryview) -> None:
        """Write the next piece.

        Raises:
            SyncFailure: another connection took over, or the disk is full.
        """
        with self._holder.lock, storage("upload"):
            if not self.held:
                raise SyncFailure("conflict", "another connection resumed this upload")
            self._file.append(data)

    @property
    def held(self) -> bool:
        """Whether no other exchange has taken this upload over."""
        return self._holder.token is self._token

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Uploads:
    """The folder of unfinished uploads, bounded per node and in age."""

    def __init__(self, folder: Path, limits: Limits, vault: Vault) -> None:
        self._folder = folder
        self._vault = vault
        self._limits = limits
        self._holders: dict[Path, _Holder] = {}
        self._lock = threading.Lock()
        self._expire()

    @contextmanager
    def open(self, manifest: VersionManifest) -> Iterator[Upload]:
        """Open the upload that ``manifest`` is about, where it was left."""
        name = (manifest.adapter, manifest.node, manifest.payload_sha256, manifest.payload_bytes)
        key = hashlib.sha256("\0".join(map(str, name)).encode()).hexdigest()[:32]
        with self._lock, storage("upload"):
            folder = self._folder / manifest.node
            folder.mkdir(exist_ok=True)
            path = folder / f"{key}.part"
            self._expire()
            if not path.exists():
                self._make_room(folder)
            holder = self._holders.setdefault(path, _Holder())
            upload = Upload(path, manifest.payload_bytes, holder, self._vault)
        try:
            yield upload
        finally:
            upload.close()
            with self._lock:
                if upload.held:
                    self._holders.pop(path, None)

    def scratch(self, data: bytes) -> Path:
        """Write a payload the server made itself, for :meth:`Store.commit` to take."""
        with storage("payload"):
            path = self._folder / f"{uuid.uuid4().hex}.part"
            self._vault.write(path, [data])
        return path

    def _make_room(self, folder: Path) -> None:
        there = sorted(folder.glob("*.part"), key=_written)
        idle = [path for path in there if path not in self._holders]
        for path in idle[: max(0, len(there) - self._limits.uploads_per_node + 1)]:
            path.unlink(missing_ok=True)
            there.remove(path)
        if len(there) >= self._limits.uploads_per_node:
            raise SyncFailure("busy", f"node {folder.name!r} has {len(there)} uploads running")

    def _expire(self) -> None:
        oldest = time.time() - self._limits.upload_seconds
        for path in self._folder.glob("**/*.part"):
            if path not in self._holders and _written(path) < oldest:
                path.unlink(missing_ok=True)


def _written(path: Path) -> float:
    """Return when a file was last written; infinity when a commit has just taken it away."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
