"""Where a job's vectors go: a folder that appears whole, an object store, a memory store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from memopt.errors import ConfigurationError, InputError
from memopt.extras import require
from memopt.files import sync
from memopt.jobs.places import create_file, file_sizes, is_url, local_path
from memopt.jobs.source import VECTOR

if TYPE_CHECKING:
    import pyarrow as pa

    from memopt.jobs.worker import EmbedTask

KINDS = ("parquet", "lance", "memory")
PARTS = "parts"
# Of an object store: tells that all parts are there, as for Spark; no reader takes it for data.
_WHOLE = "_SUCCESS"

Notes = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a memory store made of the rows: new ones, and ones that were there already."""

    added: int
    already: int


class Destination(Protocol):
    """A place for the vectors; ``home`` is the job's folder, ``parts`` where workers write."""

    place: str
    kind: str
    home: Path
    parts: str

    def exists(self) -> bool:
        """Return whether something is there that a new job must not touch."""

    def check(self, notes: Notes, finished: bool) -> None:
        """Refuse parts that are no longer what was committed (InputError)."""

    def finish(self, task: EmbedTask, schema: pa.Schema, notes: Notes) -> Stored | None:
        """Make the parts a whole; done twice it is done once."""


def open_destination(place: str, asked: str) -> Destination:
    """Return the destination that a place and ``--to`` name.

    Raises:
        ConfigurationError: an unknown kind, or a place that it cannot be written to.
        MissingExtra: what writes it is not installed.

    >>> open_destination("/data/rows", "auto").home
    PosixPath('/data/rows.job')
    """
    kind = kind_of(place, asked)
    if kind == "lance":
        require("lance", extra="jobs", why="write a Lance data set")
    if kind == "memory":
        require("lancedb", extra="memory", why="write into a memory store")
    if not is_url(place):
        path = local_path(place).absolute()
        place, home = str(path), path.with_name(f"{path.name}.job")
    else:
        if place.startswith("memory:"):
            raise ConfigurationError(
                f"{place} is of one process, and workers are others", fix="give a path or s3://..."
            )
        place = place.rstrip("/")
        # Notes are renamed into place and locked, which no object store does.
        home = Path.cwd() / f"{place.rpartition('/')[2]}.job"
    if kind == "memory":
        return MemoryDestination(place, home)
    return Bucket(place, kind, home) if is_url(place) else Folder(place, kind, home)


def kind_of(place: str, asked: str) -> str:
    """Return what a destination is.

    >>> kind_of("rows.lance", "auto"), kind_of("s3://data/rows", "auto"), kind_of("notes", "memory")
    ('lance', 'parquet', 'memory')
    """
    if asked not in ("auto", *KINDS):
        raise ConfigurationError(f"--to {asked!r}", fix=f"choose auto or {', '.join(KINDS)}")
    if asked != "auto":
        return asked
    return "lance" if place.rstrip("/").endswith(".lance") else "parquet"


class Folder:
    """A folder that appears at once and whole: parts are written beside it, then renamed."""

    def __init__(self, place: str, kind: str, home: Path) -> None:
        self.place, self.kind, self.home = place, kind, home
        self.parts = str(home / PARTS)

    def exists(self) -> bool:
        """See :class:`Destination`."""
        return Path(self.place).exists()

    def check(self, notes: Notes, finished: bool) -> None:
        """See :class:`Destination`."""
        if not self.exists():
            _check_sizes(self.parts, notes)

    def finish(self, task: EmbedTask, schema: pa.Schema, notes: Notes) -> None:
        """See :class:`Destination`."""
        if self.exists():
            return  # renamed, and killed before that was noted
        folder, target = Path(self.parts), Path(self.place)
        names = {note["file"] for note in notes.values()}
        for left in folder.rglob("*"):
            # Of a worker that was killed: nothing that was not committed goes along.
            if left.is_file() and str(left.relative_to(folder)) not in names:
                left.unlink()
        for empty in [path for path in folder.iterdir() if path.name.startswith(".")]:
            shutil.rmtree(empty, ignore_errors=True)
        shutil.rmtree(folder / "_versions", ignore_errors=True)
        if self.kind == "lance":
            _commit_lance(self.parts, schema, notes)
            for path in folder.rglob("*"):
                sync(path)
        sync(folder)
        folder.rename(target)
        sync(target.parent)


class Bucket:
    """A place of an object store, or of another file system that is reached by an URL.

    An object is whole or not there, but no folder can be renamed: parts are written where they
    stay, under names that the same rows give again. Of a Lance data set nothing is seen before its
    one commit; of Parquet files ``_SUCCESS`` comes last.
    """

    def __init__(self, place: str, kind: str, home: Path) -> None:
        self.place = self.parts = place
        self.kind, self.home = kind, home

    def exists(self) -> bool:
        """See :class:`Destination`."""
        return bool(file_sizes(self.place))

    def check(self, notes: Notes, finished: bool) -> None:
        """See :class:`Destination`."""
        _check_sizes(self.parts, notes)

    def finish(self, task: EmbedTask, schema: pa.Schema, notes: Notes) -> None:
        """See :class:`Destination`."""
        _check_sizes(self.parts, notes)
        if self.kind == "parquet":
            create_file(self.place, _WHOLE)
        elif not any(name.startswith("_versions/") for name in file_sizes(self.place)):
            _commit_lance(self.place, schema, notes)


class MemoryDestination:
    """A memory store, which is filled when all parts are there; what is in it is left."""

    kind = "memory"

    def __init__(self, place: str, home: Path) -> None:
        self.place, self.home = place, home
        self.parts = str(home / PARTS)

    def exists(self) -> bool:
        """See :class:`Destination`."""
        return False  # one that is there takes more

    def check(self, notes: Notes, finished: bool) -> None:
        """See :class:`Destination`."""
        if not finished:
            _check_sizes(self.parts, notes)

    def finish(self, task: EmbedTask, schema: pa.Schema, notes: Notes) -> Stored:
        """See :class:`Destination`.

        Columns named category, timestamp, expires_at and memory_id are the memories' own.
        """
        from memopt.memory.io.models import Models
        from memopt.memory.session import open_memory

        def batches() -> Iterator[pa.RecordBatch]:
            import pyarrow.parquet as pq

            own = ("memory_id", "category", "timestamp", "expires_at")
            text = task.source.column
            for note in notes.values():
                rows = pq.read_table(Path(self.parts) / note["file"])
                rows = rows.select([text, VECTOR, *(n for n in own if n in rows.schema.names)])
                renamed = {text: "text", VECTOR: "joint_embedding"}
                yield from rows.rename_columns(renamed).to_batches()

        models = Models(text=task.bundle)
        with open_memory(self.place, models=models, background=False) as memory:
            result = memory.store.add_arrow(batches())
            memory.store.index.ensure()
        return Stored(result.added, result.already)


def _check_sizes(place: str, notes: Notes) -> None:
    sizes = file_sizes(place)
    for note in notes.values():
        if sizes.get(note["file"]) != note["bytes"]:
            raise InputError(
                f"{place}/{note['file']} is not what was committed",
                fix="delete the job's folder and what it wrote, and begin anew",
            )


def _commit_lance(place: str, schema: pa.Schema, notes: Notes) -> None:
    import lance
    from lance.fragment import FragmentMetadata

    fragments: Sequence[Any] = [
        FragmentMetadata.from_json(json.dumps(note["fragment"])) for note in notes.values()
    ]
    lance.LanceDataset.commit(place, lance.LanceOperation.Overwrite(schema, fragments))
