"""The server's versions on disk: each is a folder that appears whole by one rename.

    <store>/lock                              held by the one server that may write
    <store>/socket                            where its private socket is, outside of the store
    <store>/audit.log                         memopt.federation.trust.audit
    <store>/sealed                            there when payloads and weights are under a key
    <store>/incoming/<upload>.part            unfinished uploads, for resuming
    <store>/adapters/<id>/<sequence>/         manifest.json, payload.bin, weights.safetensors
    <store>/adapters/<id>/.staging-*          a version being written; removed at start

A version exists when its folder has its number for a name. The files and the folder are flushed
before the rename and the parent after it, so kill -9 at any moment leaves the version whole or
absent. Only the newest versions, and one in twenty, keep their weights; others are rebuilt.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from memopt.errors import ConfigurationError, WeightsError
from memopt.federation.delta.adapters import kept_parts, read_kept
from memopt.federation.delta.arrays import Array, require_same, total_bytes
from memopt.federation.delta.compute import full_payload
from memopt.federation.delta.payload import unpack
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import Limits, check_adapter, strict_json
from memopt.federation.trust.manifest import Head, Signed, parse_signed
from memopt.federation.trust.vault import Vault
from memopt.files import lock_plain, sync

MANIFEST, PAYLOAD, WEIGHTS, SNAPSHOT = (
    "manifest.json",
    "payload.bin",
    "weights.safetensors",
    "snapshot.bin",
)
# Weights are kept for the newest versions and every so many, so that a rebuild is a short chain.
_KEEP_WEIGHTS, _WEIGHTS_EVERY = 2, 20
_CACHE_BYTES = 1 << 30  # of decoded weights, in memory


class Store:
    """Versions of adapters in one folder, one server at a time.

    Args:
        folder: made when it is not there.
        limits: sizes that are believed when reading back.
        dictionaries: zstd dictionaries by SHA-256.
        keep: versions kept for history and rollback; older ones are removed.
        vault: keeps payloads and weights as they are, or sealed; what is still plain in a store
            that gets a key is sealed when it is opened.

    Raises:
        ConfigurationError: another server has the folder, or the key is missing or wrong.
    """

    def __init__(
        self,
        folder: str | Path,
        limits: Limits | None = None,
        *,
        dictionaries: Mapping[str, bytes] | None = None,
        keep: int = 200,
        vault: Vault | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.limits = limits or Limits()
        self._dictionaries = dict(dictionaries or {})
        self._keep = max(keep, 2)
        self.vault = vault or Vault()
        self._cache: OrderedDict[str, dict[str, Array]] = OrderedDict()
        self._locks: dict[str, threading.RLock] = {}
        self._guard = threading.Lock()
        # Weights are their owner's business, unless the folder is there with other rights.
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.incoming.mkdir(exist_ok=True)
        (self.folder / "adapters").mkdir(exist_ok=True)
        lock = lock_plain(self.folder / "lock")
        if lock is None:
            raise ConfigurationError(
                f"store {self.folder} is in use by another server", fix="stop it first"
            )
        self._lock_file = lock
        versions = self.folder / "adapters"
        for leftover in versions.glob("*/.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for unfinished in versions.glob("*/*/.*"):
            unfinished.unlink(missing_ok=True)
        for upload in self.incoming.glob("**/*.part"):
            # Killed right after a rename: the file is a version's payload too, and no upload.
            if upload.stat().st_nlink > 1:
                upload.unlink()
        try:
            kept = (PAYLOAD, WEIGHTS, SNAPSHOT)
            self.vault.admit(
                self.folder, (path for name in kept for path in versions.glob(f"*/*/{name}"))
            )
        except BaseException:
            self._lock_file.close()
            raise

    def close(self) -> None:
        """Let another server have the folder."""
        self._lock_file.close()

    @property
    def incoming(self) -> Path:
        """Folder of unfinished uploads, on the same file system as the versions."""
        return self.folder / "incoming"

    @contextmanager
    def locked(self, adapter: str) -> Iterator[None]:
        """Hold the adapter: its head does not move meanwhile."""
        with self._guard:
            lock = self._locks.setdefault(adapter, threading.RLock())
        with lock:
            yield

    def adapters(self) -> list[str]:
        """Return the ids of the adapters that have a version."""
        names = (p.name for p in (self.folder / "adapters").iterdir())
        return sorted(name for name in names if self.sequences(name))

    def sequences(self, adapter: str) -> list[int]:
        """Return the sequence numbers that are there, in order."""
        folder = self._folder(adapter)
        if not folder.is_dir():
            return []
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())

    def head(self, adapter: str) -> Head:
        """Return the newest version."""
        there = self.sequences(adapter)
        if not there:
            return Head()
        return self.signed(adapter, there[-1]).manifest.head()

    def newest(self, adapter: str) -> int:
        """Return the number of the newest version.

        Raises:
            SyncFailure: there is none yet.
        """
        there = self.sequences(adapter)
        if not there:
            raise SyncFailure(
                "not-found", f"adapter {adapter!r} has no version yet", fix="push one first"
            )
        return there[-1]

    def signed(self, adapter: str, sequence: int) -> Signed:
        """Return the signed manifest of a version.

        Raises:
            SyncFailure: there is no such version, or its manifest is damaged.
        """
        path = self._version(adapter, sequence) / MANIFEST
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise SyncFailure(
                "not-found",
                f"adapter {adapter!r} has no version {sequence}",
                fix="see: memopt sync history",
            ) from None
        return parse_signed(strict_json(data, what=str(path)), self.limits)

    def payload(self, adapter: str, sequence: int) -> Path | None:
        """Return the file of a version's payload, None for a rollback (it has none)."""
        path = self._version(adapter, sequence) / PAYLOAD
        return path if path.is_file() else None

    def weights(self, adapter: str, sequence: int) -> dict[str, Array]:
        """Return a version's weights, checked against its hash; rebuilt when they are not stored.

        Raises:
            SyncFailure: no such version, or what is on disk does not give the signed hash.
        """
        if sequence == 0:
            return {}
        manifest = self.signed(adapter, sequence).manifest
        cached = self._cached(manifest.new_hash)
        if cached is not None:
            return cached
        weights = self._stored(adapter, sequence, manifest.new_hash)
        if weights is None:
            weights = self._rebuild(adapter, sequence)
            require_same(manifest.new_hash, weights, what=f"{adapter} version {sequence}")
        self._remember(manifest.new_hash, weights)
        return weights

    def snapshot(self, adapter: str, sequence: int) -> Path:
        """Return a file with a full payload of a version, made at first use."""
        payload = self.payload(adapter, sequence)
        if payload is not None and self.signed(adapter, sequence).manifest.kind == "full":
            return payload
        path = self._version(adapter, sequence) / SNAPSHOT
        with self.locked(adapter):
            if not path.is_file():
                data = full_payload(self.weights(adapter, sequence)).payload
                with storage(f"snapshot of {adapter}"):
                    self.vault.write(path, [data])
        return path

    def commit(self, signed: Signed, payload: Path | None, weights: dict[str, Array]) -> None:
        """Make the next version; the caller holds :meth:`locked` and has checked everything.

        Raises:
            SyncFailure: ``storage`` when the disk is full or fails; nothing is there then.
        """
        manifest = signed.manifest
        folder = self._folder(manifest.adapter)
        target = self._version(manifest.adapter, manifest.sequence)
        with storage(f"version {manifest.sequence} of {manifest.adapter}"):
            folder.mkdir(exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
            try:
                self.vault.write(staging / WEIGHTS, kept_parts(weights))
                # Manifests hold hashes and names only, and any reader may check them: never sealed.
                Vault().write(staging / MANIFEST, [json.dumps(signed.to_json(), indent=1).encode()])
                if payload is not None:
                    sync(payload)
                    os.link(payload, staging / PAYLOAD)
                sync(staging)
                staging.rename(target)
                if payload is not None:
                    # The version's payload is this very file: under this name it could be written.
                    payload.unlink(missing_ok=True)
                sync(folder)
                sync(folder.parent)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        self._remember(manifest.new_hash, weights)
        self._prune(manifest.adapter)

    def _prune(self, adapter: str) -> None:
        there = self.sequences(adapter)
        for sequence in there[:-_KEEP_WEIGHTS]:
            folder = self._version(adapter, sequence)
            (folder / SNAPSHOT).unlink(missing_ok=True)
            if sequence % _WEIGHTS_EVERY and sequence != there[0]:
                (folder / WEIGHTS).unlink(missing_ok=True)
        if len(there) <= self._keep:
            return
        # The oldest version that stays must stand alone: it keeps its weights.
        standing = [
            s for s in there[: -self._keep + 1] if (self._version(adapter, s) / WEIGHTS).is_file()
        ]
        for sequence in there[: there.index(standing[-1])] if standing else []:
            trash = self._folder(adapter) / f".trash-{sequence}"
            self._version(adapter, sequence).rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _stored(self, adapter: str, sequence: int, expected: str) -> dict[str, Array] | None:
        path = self._version(adapter, sequence) / WEIGHTS
        if not path.is_file():
            return None
        try:
            weights = read_kept(path, self.vault)
            require_same(expected, weights, what=str(path))
        except (WeightsError, SyncFailure):
            # A bad disk: the chain of payloads can still give the same weights.
            return None
        return weights

    def _rebuild(self, adapter: str, sequence: int) -> dict[str, Array]:
        chain = [sequence]
        base: dict[str, Array] = {}
        while True:
            manifest = self.signed(adapter, chain[-1]).manifest
            if manifest.kind == "full":
                break
            before = manifest.target if manifest.kind == "rollback" else chain[-1] - 1
            if before == 0:
                break
            if before not in self.sequences(adapter):
                raise SyncFailure("not-found", f"version {before} of {adapter!r} was removed")
            stored = self._stored(adapter, before, self.signed(adapter, before).manifest.new_hash)
            if stored is not None:
                base = stored
                break
            chain.append(before)
        for step in reversed(chain):
            payload = self.payload(adapter, step)
            if payload is None:
                continue
            manifest, data = self.signed(adapter, step).manifest, self.vault.read(payload)
            if hashlib.sha256(data).hexdigest() != manifest.payload_sha256:
                raise SyncFailure("storage", f"payload of {adapter} version {step} is damaged")
            base = self.decode(data, base, kind=manifest.kind)
        return base

    def decode(self, payload: bytes, base: dict[str, Array], *, kind: str) -> dict[str, Array]:
        """Return what a payload of that kind makes of ``base``, within the limits."""
        return unpack(payload, base, self.limits, self._dictionaries, kind=kind)

    def _cached(self, key: str) -> dict[str, Array] | None:
        with self._guard:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    def _remember(self, key: str, weights: dict[str, Array]) -> None:
        with self._guard:
            self._cache[key] = weights
            while len(self._cache) > 1 and (
                sum(total_bytes(w) for w in self._cache.values()) > _CACHE_BYTES
            ):
                self._cache.popitem(last=False)

    def _folder(self, adapter: str) -> Path:
        return self.folder / "adapters" / check_adapter(adapter)

    def _version(self, adapter: str, sequence: int) -> Path:
        return self._folder(adapter) / f"{sequence:08d}"


@contextmanager
def storage(what: str) -> Iterator[None]:
    """Turn a full or failing disk into a ``storage`` failure."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full" if full else str(error.strerror)
        raise SyncFailure(
            "storage", f"{what} cannot be stored: {reason}", fix="free space on the server"
        ) from error
