"""Unfinished uploads: one file each, named by what is being uploaded, so that it can resume."""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from memopt.federation.failures import SyncFailure
from memopt.federation.limits import Limits
from memopt.federation.protocol import CHUNK_BYTES
from memopt.federation.signing import Manifest
from memopt.federation.store import storage
from memopt.federation.vault import Appending, Vault


class Upload:
    """One upload held by one exchange; a newer exchange for the same upload takes it over."""

    def __init__(self, path: Path, total: int, owner: dict[Path, object], vault: Vault) -> None:
        self.path = path
        self._total = total
        self._owner = owner
        self._token = object()
        owner[path] = self._token
        self._file = Appending(path, vault)
        if self.size > total:
            self._file.clear()

    @property
    def size(self) -> int:
        """How many bytes are there."""
        return self._file.size

    def append(self, offset: int, data: memoryview) -> None:
        """Write the next chunk.

        Raises:
            SyncFailure: it is not the next one, or another connection took over.
        """
        if self._owner.get(self.path) is not self._token:
            raise SyncFailure("conflict", "another connection resumed this upload")
        if offset != self.size:
            raise SyncFailure("out-of-order", f"chunk at {offset}, expected {self.size}")
        if not 0 < len(data) <= 2 * CHUNK_BYTES or self.size + len(data) > self._total:
            raise SyncFailure("too-large", f"chunk of {len(data)} bytes does not fit")
        self._file.append(data)

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._owner.get(self.path) is self._token:
            del self._owner[self.path]


class Uploads:
    """The folder of unfinished uploads, bounded per node and in age."""

    def __init__(self, folder: Path, limits: Limits, vault: Vault) -> None:
        self._folder = folder
        self._vault = vault
        self._limits = limits
        self._owner: dict[Path, object] = {}
        self._lock = threading.Lock()
        self._expire()

    @contextmanager
    def open(self, manifest: Manifest) -> Iterator[Upload]:
        """Open the upload that ``manifest`` is about, where it was left."""
        name = f"{manifest.adapter}\0{manifest.node}\0{manifest.payload_sha256}"
        key = hashlib.sha256(name.encode()).hexdigest()[:32]
        with self._lock, storage("upload"):
            folder = self._folder / manifest.node
            folder.mkdir(exist_ok=True)
            path = folder / f"{key}.part"
            self._expire()
            if not path.exists():
                self._make_room(folder)
            upload = Upload(path, manifest.payload_bytes, self._owner, self._vault)
        with upload:
            yield upload

    def scratch(self, data: bytes) -> Path:
        """Write a payload the server made itself, for :meth:`Store.commit` to take."""
        with storage("payload"):
            path = self._folder / f"{uuid.uuid4().hex}.part"
            self._vault.write(path, [data])
        return path

    def _make_room(self, folder: Path) -> None:
        there = sorted(folder.glob("*.part"), key=lambda p: p.stat().st_mtime)
        idle = [path for path in there if path not in self._owner]
        for path in idle[: max(0, len(there) - self._limits.uploads_per_node + 1)]:
            path.unlink(missing_ok=True)
            there.remove(path)
        if len(there) >= self._limits.uploads_per_node:
            raise SyncFailure("busy", f"node {folder.name!r} has {len(there)} uploads running")

    def _expire(self) -> None:
        oldest = time.time() - self._limits.upload_seconds
        for path in self._folder.glob("**/*.part"):
            if path not in self._owner and path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)
