"""A bundle under a key: weights and graphs are encrypted on disk, and plain in memory only.

Every recorded file that holds weights (Parquet, graphs and what belongs to them) is AES-256-GCM on
disk (:mod:`memopt.weights.crypto`); its record in the manifest says so and keeps the plain file's
hash. Whoever opens the bundle gets a private folder, in memory where the system has such a place,
with the plain files that are needed, and takes it away at the end.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from memopt.bundle import MANIFEST, Bundle, Manifest, file_record, open_bundle, stamp
from memopt.errors import BundleError
from memopt.files import staged_directory
from memopt.sealing import load_key
from memopt.weights.crypto import decrypt_file, encrypt_file

_MEMORY = Path("/dev/shm")
_CACHES = ".ort-cache"  # optimized copies of graphs, in the clear
# Files beside the manifest that no command records, and people read.
_REPORTS = (".html", ".json", ".svg", ".png", ".md")


def encrypt_bundle(bundle: Bundle, key: bytes) -> Bundle:
    """Encrypt every file of weights in a bundle, all or none; return the bundle anew.

    Graph caches beside them are removed: they hold the weights too. What was on the disk before may
    be found there until the space is used again.

    Args:
        key: 32 bytes.

    Raises:
        BundleError: a file is not the one that the manifest records, or is missing.
    """
    names = [n for n in _weights(bundle.manifest) if "plain" not in bundle.manifest.files[n]]
    for name in names:
        if not (bundle.path / name).is_file():
            raise BundleError(f"{bundle.path / name} is missing", fix="export the model again")
    bundle.check(*names, mode="always")
    with staged_directory(bundle.path) as folder:
        staged = {
            name: _sealed(bundle.path / name, folder / str(n), key) for n, name in enumerate(names)
        }
        records = {
            name: {**file_record(file), "plain": bundle.manifest.files[name]}
            for name, file in staged.items()
        }
        event = stamp({"event": "encrypt", "files": len(names)})
        done = bundle.update(
            lambda m: replace(m, files={**m.files, **records}, history=(*m.history, event)),
            staged,
        )
    for cache in bundle.path.rglob(_CACHES):
        shutil.rmtree(cache, ignore_errors=True)
    return done


def decrypt_bundle(bundle: Bundle, key: bytes) -> Bundle:
    """Undo :func:`encrypt_bundle`; return the bundle anew.

    Raises:
        WeightsError: a wrong key, or a file that was changed.
    """
    names = [name for name, record in bundle.manifest.files.items() if "plain" in record]
    with staged_directory(bundle.path) as folder:
        staged, records = {}, {}
        for number, name in enumerate(names):
            records[name] = bundle.manifest.files[name]["plain"]
            staged[name] = folder / str(number)
            decrypt_file(bundle.path / name, staged[name], key, sha256=records[name]["sha256"])
        event = stamp({"event": "decrypt", "files": len(names)})
        return bundle.update(
            lambda m: replace(m, files={**m.files, **records}, history=(*m.history, event)),
            staged,
        )


class Unlocked:
    """The plain copy of an encrypted bundle, in a folder that only its owner may enter.

    Attributes:
        bundle: the copy; files of weights are there once :meth:`need` asked for them.
    """

    def __init__(self, bundle: Bundle, key: bytes | None = None) -> None:
        self.source = bundle
        self._key = key or load_key()
        parent = _MEMORY if os.access(_MEMORY, os.W_OK) else None
        folder = Path(tempfile.mkdtemp(prefix="memopt-", dir=parent))
        # A child of fork() must not take away what its parent works with.
        self._remove = weakref.finalize(self, _remove, folder, os.getpid())
        manifest = bundle.manifest
        plain = {name: dict(record.get("plain", record)) for name, record in manifest.files.items()}
        self.bundle = Bundle(folder, replace(manifest, files=plain))
        for name, record in manifest.files.items():
            if "plain" not in record and (bundle.path / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.path / name, folder / name)
        (folder / MANIFEST).write_text(self.bundle.manifest.to_json(), encoding="utf-8")

    def need(self, *names: str) -> None:
        """Decrypt these files, unless they are there.

        Raises:
            WeightsError: a wrong key, or a file that was changed.
        """
        for name in names:
            target = self.bundle.path / name
            record = self.source.manifest.files.get(name, {})
            if "plain" in record and not target.is_file():
                # Anew where a parent process has taken it away already.
                self.bundle.path.mkdir(mode=0o700, exist_ok=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                path = self.source.path / name
                decrypt_file(path, target, self._key, sha256=record["plain"]["sha256"])

    def put_back(self) -> None:
        """Write what a command added to the copy into the bundle, weights encrypted."""
        known, made = self.bundle.manifest, open_bundle(self.bundle.path).manifest
        if made != known:
            new = {n: r for n, r in made.files.items() if r != known.files.get(n)}
            weights = set(_weights(made))
            with staged_directory(self.source.path) as folder:
                staged: dict[str, Path] = {}
                records: dict[str, Mapping[str, Any]] = {}
                for number, (name, record) in enumerate(new.items()):
                    file, path = folder / str(number), self.bundle.path / name
                    if name in weights:
                        staged[name] = _sealed(path, file, self._key)
                        records[name] = {**file_record(file), "plain": dict(record)}
                    else:
                        staged[name], records[name] = Path(shutil.copyfile(path, file)), record
                self.source.update(lambda m: _merged(m, made, records), staged)
        for path in self.bundle.path.rglob("*"):
            name = str(path.relative_to(self.bundle.path))
            unknown = name not in made.files and name != MANIFEST and not _hidden(name)
            if path.is_file() and unknown and path.suffix in _REPORTS:
                (self.source.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, self.source.path / name)

    def close(self) -> None:
        """Take the plain copy away."""
        self._remove()


@contextmanager
def unlocked(bundle: Bundle, key: bytes | None = None) -> Iterator[Bundle]:
    """Yield the bundle to work on: itself, or the plain copy of an encrypted one.

    What the block adds (variants, weights) is put back encrypted when it ends well.

    Args:
        key: of the bundle; None takes the environment's (:func:`memopt.sealing.load_key`).
    """
    if not bundle.encrypted:
        yield bundle
        return
    copy = Unlocked(bundle, key)
    try:
        copy.need(*bundle.manifest.files)
        yield copy.bundle
        copy.put_back()
    finally:
        copy.close()


def _weights(manifest: Manifest) -> list[str]:
    graphs = {n for v in manifest.variants.values() for n in (v.file, *v.companions)}
    return [n for n in manifest.files if n in graphs or n.endswith(".parquet")]


def _sealed(path: Path, target: Path, key: bytes) -> Path:
    encrypt_file(path, target, key)
    target.chmod(0o600)
    return target


def _merged(now: Manifest, made: Manifest, records: Mapping[str, Mapping[str, Any]]) -> Manifest:
    files = {name: records.get(name, now.files.get(name, {})) for name in made.files}
    return replace(made, files=files)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
