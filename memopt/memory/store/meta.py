"""``memory.json``: what a store is, beside its tables."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from memopt.errors import ConsolidationError
from memopt.files import atomic_path, read_plain
from memopt.jsontext import parse_json
from memopt.memory.model.schema import FORMAT_VERSION, PLAIN_FORMAT

META_FILE, MODELS_FILE = "memory.json", "models.json"
META_TABLE = "meta"
TABLES = ("memories", "edges", "access_log", "events")


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """The contents of ``memory.json``.

    Attributes:
        model_id: what made the vectors; '' while nobody said.
        key_id: the key the content is encrypted with; None in a plain store.
        id_key: base64 of the encrypted random key of the content hashes; opening it proves the
            key, and without it nobody can test a guessed text against the memory ids. Tied, as
            cells are, once all of them are.
        retention: category -> days its memories are kept.
    """

    format: int = PLAIN_FORMAT
    dim: int
    model_id: str = ""
    created_at: str = ""
    key_id: str | None = None
    id_key: str | None = None
    retention: dict[str, float] = field(default_factory=dict)


class Location:
    """Where a store lies: a local folder, or the URI of an object store.

    On an object store the meta is a table of one row, so that whoever can reach the tables (by
    whatever credentials) can reach it, and so that it is replaced in one commit; ``database`` must
    be set there before it is read.

    >>> Location("notes").local
    PosixPath('notes')
    >>> Location("s3://bucket/notes").local is None
    True
    """

    def __init__(self, path_or_uri: str | Path) -> None:
        self.uri = str(path_or_uri)
        if self.uri.startswith("file://"):
            self.uri = self.uri.removeprefix("file://")
        self.local = None if "://" in self.uri else Path(self.uri)
        self.database: Any = None

    def __str__(self) -> str:
        return self.uri

    def read(self) -> Meta | None:
        """Return the store's meta, None where there is no ``memory.json``.

        Raises:
            ConsolidationError: the file is damaged or of a newer format.
        """
        if self.local is not None:
            data = read_plain(self.local / META_FILE)
            return None if data is None else parse_meta(data, self)
        try:
            rows = self.database.open_table(META_TABLE).search().limit(None).to_list()
        except ValueError:
            return None
        return parse_meta(rows[0]["json"].encode(), self) if rows else None

    def stamp(self) -> object:
        """Return a value that changes whenever ``memory.json`` is written; None on object stores.

        >>> Location("no/such/folder").stamp() is None
        True
        """
        if self.local is None:
            return None
        try:
            status = (self.local / META_FILE).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def write(self, meta: Meta) -> None:
        """Write ``memory.json``, whole or not at all."""
        text = json.dumps(asdict(meta), indent=2, sort_keys=True) + "\n"
        if self.local is not None:
            with atomic_path(self.local / META_FILE, 0o600) as path:
                path.write_text(text)
            return
        row = pa.table({"json": [text]})
        there = self.read() is not None
        self.database.create_table(META_TABLE, row, mode="overwrite" if there else "create")

    def tighten(self) -> None:
        """Make a local store its owner's alone; one of somebody else is left as it is.

        The folder's bits guard all that Lance writes inside.
        """
        if self.local is None:
            return
        for path in (self.local, self.local / META_FILE, self.local / MODELS_FILE):
            with suppress(OSError):
                mode = path.stat().st_mode
                if mode & 0o077 and not path.is_symlink():
                    path.chmod(mode & 0o700)

    def check_free(self, *, create: bool) -> None:
        """Make the folder of a new store, where there is none yet.

        Raises:
            ConsolidationError: the path is a file or a folder with something else in it, or a
                store may not be made here.
        """
        if self.local is not None and self.local.is_file():
            raise ConsolidationError(
                f"{self.local} is a file, not a memory store", fix="give a folder"
            )
        if not create:
            raise ConsolidationError(
                f"{self} is no memory store", fix="check the path, or add a memory to make one"
            )
        if self.local is None:
            return
        try:
            self.local.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConsolidationError(
                f"{self.local} cannot be made ({error.strerror})", fix="give another folder"
            ) from error
        ours = {f"{name}.lance" for name in TABLES}
        # Our own tables without memory.json are a creation that was cut short: it is finished.
        other = sorted(
            entry.name
            for entry in self.local.iterdir()
            if entry.name not in ours and not entry.name.startswith(".")
        )
        if other:
            raise ConsolidationError(
                f"{self.local} is no memory store: it has no {META_FILE} and holds {other[0]!r}",
                fix="give the folder of a store, or a new or empty folder to make one",
            )


def parse_meta(data: bytes, where: Any = META_FILE) -> Meta:
    """Read the bytes of a ``memory.json``.

    Raises:
        ConsolidationError: it is damaged, or of a format this memopt does not know.

    >>> parse_meta(b'{"format": 1, "dim": 8}').dim
    8
    """
    try:
        values = parse_json(data, str(where))
        version = int(values["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConsolidationError(
            f"{where}: {META_FILE} is damaged ({type(error).__name__}: {error})",
            fix="restore it from a copy of the store",
        ) from error
    if version > FORMAT_VERSION:
        raise ConsolidationError(
            f"{where} has store format {version}, this memopt reads up to {FORMAT_VERSION}",
            fix="upgrade memopt: pip install -U memopt",
        )
    unknown = sorted(set(values) - {item.name for item in fields(Meta)})
    if unknown or type(values.get("dim")) is not int or values["dim"] < 1:
        problem = f"unknown key {unknown[0]!r}" if unknown else f"dim {values.get('dim')!r}"
        raise ConsolidationError(f"{where}: {META_FILE} is damaged ({problem})")
    return Meta(**values)
