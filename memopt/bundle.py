"""A bundle: a model directory in the ecosystem's layout plus the ``memopt.json`` manifest.

The manifest is the only state. It is plain JSON, written whole and renamed into place under a
lock, so that two commands on one bundle never lose each other's entry.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from memopt.errors import BundleError, ConfigurationError
from memopt.files import atomic_path, open_plain, sha256_file, stays_below, swapped_in
from memopt.foreign import taken_by
from memopt.jsontext import parse_json
from memopt.registry import nearest
from memopt.tasks.table import MODALITIES, Task, task_of
from memopt.tasks.table import TASKS as TASKS
from memopt.verified import has_hash

MANIFEST = "memopt.json"
FORMAT_VERSION = 1
# "chain": what modules.json says step by step, see memopt.weights.chain.
POOLINGS = ("mean", "cls", "max", "last", "model", "chain", "none")
FORMATS = ("onnx", "openvino", "torch-aoti")
# How the hashes of files are checked when they are opened.
VERIFY = ("open", "always", "never")
_HASHED_AT_OPEN = 10**9  # bytes; hashing more would take over a second
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "int2", "nf4")


def _one_of(field_name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise BundleError(f"{field_name} {value!r} is not allowed", fix=nearest(value, allowed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One runnable graph of a bundle.

    ``check`` is the exporter's numerical check against torch, ``validation`` the quality record of
    a quantized variant, ``benchmark`` the last measurement; all three are plain JSON objects.
    ``passed`` is False for a variant that was kept although it failed its gate: the engine never
    picks such a variant by itself.
    """

    name: str
    format: str
    precision: str
    file: str  # the graph, relative to the bundle
    companions: tuple[str, ...] = ()  # files the graph needs beside it (.bin, external data)
    target: str = "any"  # any | cpu | openvino | gpu: where this graph is meant to run
    fused: bool = False  # uses operators of one runtime only
    method: str = "export"
    inputs: tuple[str, ...] = ()
    output: str = "sentence_embedding"
    task: str = ""  # that it answers, where it is not the bundle's own (a second tower)
    options: Mapping[str, str] = field(default_factory=dict)  # passed to the runtime at open
    passed: bool = True
    check: Mapping[str, Any] | None = None
    validation: Mapping[str, Any] | None = None
    benchmark: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _one_of("format", self.format, FORMATS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("task", self.task, ("", *TASKS))
        for name in (self.file, *self.companions):
            if not stays_below(name):
                raise BundleError(f"variant file {name!r:.200} points outside the bundle")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What ``memopt.json`` says; see docs/architecture.md for each field."""

    name: str
    task: str
    modality: str
    architecture: str
    model_type: str
    pooling: str = "none"
    normalize: bool = False
    max_length: int | None = None
    dimension: int | None = None
    source: str = ""
    format_version: int = FORMAT_VERSION
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # sha256, bytes
    variants: Mapping[str, Variant] = field(default_factory=dict)
    chosen: Mapping[str, Any] = field(default_factory=dict)  # machine key -> tuned choice
    validation: Mapping[str, Any] | None = None  # the set that variants were proven on last
    history: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)
        _one_of("modality", self.modality, MODALITIES)
        _one_of("pooling", self.pooling, POOLINGS)
        for name in ("max_length", "dimension"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise BundleError(f"{name} {value!r} is not a whole number above 0")
        if type(self.normalize) is not bool:
            raise BundleError(f"normalize {self.normalize!r} is neither true nor false")
        for name, record in self.files.items():
            if not stays_below(name):
                raise BundleError(f"file {name!r:.200} points outside the bundle")
            if not isinstance(record, Mapping) or not {"sha256", "bytes"} <= set(record):
                raise BundleError(f"the record of file {name!r} lacks sha256 or bytes")

    def to_json(self) -> str:
        """Return the manifest as indented JSON, keys in field order."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, origin: str) -> Manifest:
        """Parse a manifest; ``origin`` names the file in errors.

        Raises:
            BundleError: not JSON, an unknown or missing key, or a newer format version.
        """
        raw = parse_json(text, origin, error=BundleError)
        if not isinstance(raw, dict):
            raise BundleError(f"{origin} is not a JSON object")
        version = raw.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise BundleError(
                f"{origin} has format version {version!r}, this memopt reads {FORMAT_VERSION}",
                fix="upgrade memopt",
            )
        try:
            variants = {
                key: Variant(**_tupled(Variant, value))
                for key, value in raw.pop("variants", {}).items()
            }
            return cls(**{**_tupled(cls, raw), "variants": variants})
        except (TypeError, AttributeError) as error:
            raise BundleError(f"{origin} has a wrong or missing key: {error}") from error
        except BundleError as error:
            raise BundleError(f"{origin}: {error.problem}", fix=error.fix) from error


def _tupled(cls: type, raw: Mapping[str, Any]) -> dict[str, Any]:
    tuples = {f.name for f in fields(cls) if str(f.type).startswith("tuple")}
    return {key: tuple(value) if key in tuples else value for key, value in raw.items()}


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its folder and the manifest as it was when opened."""

    path: Path
    manifest: Manifest

    @property
    def task(self) -> Task:
        """The row of its task."""
        return task_of(self.manifest.task)

    @property
    def imported(self) -> bool:
        """Whether its graph was made by somebody else, and is what it is made of."""
        events = [event.get("event") for event in self.manifest.history]
        return [e for e in events if e in ("convert", "import")][-1:] == ["import"]

    @property
    def encrypted(self) -> bool:
        """Whether files of it are under a key, see :mod:`memopt.weights.locked`."""
        return any("plain" in record for record in self.manifest.files.values())

    @property
    def weights(self) -> Path:
        """The float weight file (schema V1)."""
        return self.path / "weights.parquet"

    def file(self, variant: Variant) -> Path:
        """Return the graph file of ``variant``."""
        return self.path / variant.file

    def size(self, variant: Variant) -> int:
        """Return the bytes of a variant's files, as the manifest records them."""
        files = self.manifest.files
        names = (variant.file, *variant.companions)
        return sum(files.get(name, {}).get("bytes", 0) for name in names)

    def variant(self, name: str) -> Variant:
        """Return the variant called ``name``.

        Raises:
            BundleError: there is none; the message lists those there are.
        """
        if name not in self.manifest.variants:
            known = self.manifest.variants
            fix = nearest(name, known) if known else f"run: memopt export {self.path}"
            raise BundleError(f"bundle {self.path} has no variant {name!r}", fix=fix)
        return self.manifest.variants[name]

    def config(self) -> dict[str, Any]:
        """Return the parsed ``config.json``."""
        return read_json(self.path / "config.json")

    def update(
        self, change: Callable[[Manifest], Manifest], staged: Mapping[str, Path] | None = None
    ) -> Bundle:
        """Apply ``change`` to the manifest on disk, under a lock, and return the bundle anew.

        Args:
            change: from the manifest as it is now to what it shall be.
            staged: name in the bundle -> finished file on the same file system, moved there in that
                order together with the change: both happen, or (an error, Ctrl-C) neither does.
        """
        manifest = self.path / MANIFEST
        with _locked(self.path):
            changed = change(open_bundle(self.path).manifest)
            text = changed.to_json()
            files = {self.path / name: file for name, file in (staged or {}).items()}

            def committed() -> bool:
                return manifest.read_text(encoding="utf-8") == text

            with swapped_in(files, committed), atomic_path(manifest) as path:
                path.write_text(text, encoding="utf-8")
        return Bundle(self.path, changed)

    def add_variants(
        self,
        *variants: Variant,
        event: Mapping[str, Any],
        staged: Mapping[str, Path] | None = None,
        proof: Mapping[str, Any] | None = None,
        dimension: int | None = None,
    ) -> Bundle:
        """Record variants with the hashes of their files and one event.

        Args:
            variants: to add, or to take the place of those of the same name.
            event: of the history; the time is added.
            staged: as in :meth:`update`; a file not named there is in the bundle already.
            proof: the validation set they were proven on.
            dimension: of their vectors, as measured; what a config says of it is a guess.
        """
        staged = staged or {}
        names = {n for v in variants for n in (v.file, *v.companions)}
        hashed = {name: file_record(staged.get(name, self.path / name)) for name in sorted(names)}

        def change(manifest: Manifest) -> Manifest:
            return replace(
                manifest,
                variants={**manifest.variants, **{v.name: v for v in variants}},
                files={**manifest.files, **hashed},
                validation=proof or manifest.validation,
                dimension=dimension or manifest.dimension,
                history=(*manifest.history, stamp(event)),
            )

        return self.update(change, staged)

    def add_files(self, staged: Mapping[str, Path], *, event: Mapping[str, Any]) -> Bundle:
        """Move plain files (weights) in, see :meth:`update`; record their hashes and one event."""
        hashed = {name: file_record(file) for name, file in staged.items()}
        return self.update(
            lambda m: replace(m, files={**m.files, **hashed}, history=(*m.history, stamp(event))),
            staged,
        )

    def check(self, *names: str, mode: str = "open") -> None:
        """Compare files that are about to be opened with their hashes in the manifest.

        Args:
            names: in the bundle; one that is missing, or not recorded, is not looked at.
            mode: ``open`` hashes files under 1 GB, once for each size and time of change; of larger
                ones it compares the size. ``always`` hashes every file, ``never`` none.

        Raises:
            BundleError: a file is another one than the manifest records.
            ConfigurationError: an unknown mode.
        """
        if mode not in VERIFY:
            raise ConfigurationError(f"verify {mode!r} is unknown", fix=nearest(mode, VERIFY))
        for name in names if mode != "never" else ():
            path, record = self.path / name, self.manifest.files.get(name)
            if record is None or not path.is_file():
                continue
            size = path.stat().st_size
            same = size == record["bytes"]
            if same and (mode == "always" or size < _HASHED_AT_OPEN):
                same = has_hash(path, record["sha256"], again=mode == "always")
            if not same:
                raise BundleError(
                    f"{path} is not the file that {MANIFEST} records: it was changed or swapped",
                    fix="convert and export the model again, or copy the bundle again",
                )

    def verify(self) -> list[str]:
        """Recompute every SHA-256; return one line per file that is missing or differs."""
        problems = []
        for name, record in sorted(self.manifest.files.items()):
            path = self.path / name
            if not path.is_file():
                problems.append(f"{name}: missing")
            elif sha256_file(path) != record["sha256"]:
                problems.append(f"{name}: SHA-256 differs from the manifest")
        return problems


def open_bundle(path: str | Path) -> Bundle:
    """Open the bundle in folder ``path``, or the built bundle ``models/<path>``.

    Raises:
        BundleError: there is no such folder, no manifest in it, or the manifest is damaged.

    >>> open_bundle("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """
    folder = find_bundle(path)
    if folder is None and Path(path).is_file():
        raise BundleError(
            f"{str(path)!r} is a file, not a bundle folder",
            fix=taken_by(Path(path), otherwise=f"give the folder that holds {MANIFEST}"),
        )
    if folder is None:
        convert = str(path) if (Path(path) / "config.json").is_file() else f"SOURCE -o {path}"
        raise BundleError(f"no bundle at {str(path)!r}", fix=f"run: memopt convert {convert}")
    origin = folder / MANIFEST
    try:
        text = origin.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{origin} is not UTF-8 text ({error})") from error
    return Bundle(folder, Manifest.from_json(text, origin=str(origin)))


def find_bundle(path: str | Path) -> Path | None:
    """Return the bundle folder that ``path`` names (itself, or ``models/<path>``), if any."""
    candidates = [Path(path)]
    if Path(path).name == str(path):
        candidates.append(Path("models") / path)
    return next((c for c in candidates if (c / MANIFEST).is_file()), None)


def create_bundle(folder: Path, manifest: Manifest) -> Bundle:
    """Write the first manifest into ``folder`` and hash every file that is there."""
    names = sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and _counts(p, folder)
    )
    whole = replace(manifest, files={name: file_record(folder / name) for name in names})
    with atomic_path(folder / MANIFEST) as path:
        path.write_text(whole.to_json(), encoding="utf-8")
    return Bundle(folder, whole)


def _counts(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts) and (
        path.name != MANIFEST
    )


def file_record(path: Path) -> dict[str, Any]:
    """Return ``{"sha256": ..., "bytes": ...}`` of a file."""
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def stamp(event: Mapping[str, Any]) -> dict[str, Any]:
    """Add the UTC time to a history event; ``SOURCE_DATE_EPOCH`` makes it reproducible."""
    now = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)), **event}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of the bundle.

    Raises:
        BundleError: the file is missing, not JSON, or not an object.
    """
    try:
        value = parse_json(path.read_bytes(), str(path), error=BundleError)
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path} is not a JSON object")
    return value


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # flock is released by the kernel when a process dies, so a crash never leaves a stale lock.
    # Who may change the bundle may lock it, as far as the umask lets them.
    with os.fdopen(open_plain(folder / ".memopt.lock", mode=0o666), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
