"""The parts of a destination: one file a fragment, and what joins them at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.errors import ConfigurationError, InputError
from memopt.extras import require
from memopt.files import atomic_path, publish, sha256_file, sync
from memopt.jobs.source import VECTOR

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = ("parquet", "lance", "memory")


@dataclass(frozen=True, slots=True)
class Stored:
    """What a memory store made of the rows: new ones, and ones that were there already."""

    added: int
    already: int


def kind_of(destination: str, asked: str) -> str:
    """Return what a destination is.

    >>> kind_of("rows.lance", "auto"), kind_of("rows", "auto"), kind_of("notes", "memory")
    ('lance', 'parquet', 'memory')
    """
    if asked not in ("auto", *KINDS):
        raise ConfigurationError(f"--to {asked!r}", fix=f"choose auto or {', '.join(KINDS)}")
    if "://" in destination:
        raise ConfigurationError(
            f"destination {destination!r} is an URL, and a job writes to a folder",
            fix="give a folder, and copy it when it is whole",
        )
    kind = asked if asked != "auto" else "lance" if destination.endswith(".lance") else "parquet"
    if kind == "lance":
        require("lance", extra="jobs", why="write a Lance data set")
    if kind == "memory":
        require("lancedb", extra="memory", why="write into a memory store")
    return kind


def write_part(kind: str, folder: Path, number: int, rows: pa.Table) -> dict[str, Any]:
    """Write the rows of one fragment, durably and under a name of its number alone.

    Returns:
        What the commit needs: the file, its size and its hash.
    """
    if kind == "lance":
        return _write_lance(folder, number, rows)
    import pyarrow.parquet as pq

    name = f"part-{number:08d}.parquet"
    with atomic_path(folder / name) as path:
        # Of vectors no value is there twice: a dictionary of them would only be tried and dropped.
        pq.write_table(rows, path, use_dictionary=[n for n in rows.schema.names if n != VECTOR])
    return _record(folder, name)


def _record(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    return {"file": name, "bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _write_lance(folder: Path, number: int, rows: pa.Table) -> dict[str, Any]:
    # Else it logs that each folder below is new.
    os.environ.setdefault("LANCE_LOG", "error")
    from lance.fragment import write_fragments

    # Lance names its files by chance: each is written in a folder of its own, then named.
    own = folder / f".{number:08d}"
    (written,) = write_fragments(rows, str(own), max_rows_per_file=max(1, rows.num_rows))
    fragment = written.to_json()
    (file,) = fragment["files"]
    name = f"{number:08d}.lance"
    publish(own / "data" / file["path"], folder / "data" / name)
    shutil.rmtree(own, ignore_errors=True)
    file["path"] = name
    return {**_record(folder, f"data/{name}"), "fragment": fragment}


def check_parts(folder: Path, notes: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse parts that are no longer what was committed.

    Raises:
        InputError: one is missing or has another size.
    """
    for note in notes.values():
        file = folder / note["file"]
        if not file.is_file() or file.stat().st_size != note["bytes"]:
            raise InputError(
                f"{file} is not what was committed", fix="delete the job's folder and begin anew"
            )


def finish(
    kind: str,
    folder: Path,
    destination: Path,
    schema: pa.Schema,
    notes: Sequence[Mapping[str, Any]],
) -> None:
    """Make the parts a whole: the folder of Parquet files, or a Lance data set of one commit.

    The destination appears at once and whole; done twice it is done once.
    """
    if destination.exists():
        return  # renamed, and killed before that was noted
    names = {note["file"] for note in notes}
    for left in folder.rglob("*"):
        # Of a worker that was killed: nothing that was not committed goes along.
        if left.is_file() and str(left.relative_to(folder)) not in names:
            left.unlink()
    for empty in [path for path in folder.iterdir() if path.name.startswith(".")]:
        shutil.rmtree(empty, ignore_errors=True)
    shutil.rmtree(folder / "_versions", ignore_errors=True)
    if kind == "lance":
        import lance
        from lance.fragment import FragmentMetadata

        fragments = [FragmentMetadata.from_json(json.dumps(note["fragment"])) for note in notes]
        lance.LanceDataset.commit(str(folder), lance.LanceOperation.Overwrite(schema, fragments))
        for path in folder.rglob("*"):
            sync(path)
    sync(folder)
    folder.rename(destination)
    sync(destination.parent)


def fill_store(
    destination: Path, folder: Path, files: Iterable[str], bundle: str, column: str
) -> Stored:
    """Add the rows to a memory store, made when absent; what is there is left, so twice is once.

    Columns named category, timestamp, expires_at and memory_id are the memories' own.
    """
    from memopt.memory.io.models import Models
    from memopt.memory.session import open_memory

    def batches() -> Iterator[pa.RecordBatch]:
        import pyarrow.parquet as pq

        own = ("memory_id", "category", "timestamp", "expires_at")
        for name in files:
            rows = pq.read_table(folder / name)
            rows = rows.select([column, VECTOR, *(n for n in own if n in rows.schema.names)])
            renamed = {column: "text", VECTOR: "joint_embedding"}
            yield from rows.rename_columns(renamed).to_batches()

    with open_memory(destination, models=Models(text=bundle), background=False) as memory:
        result = memory.store.add_arrow(batches())
        memory.store.index.ensure()
    return Stored(result.added, result.already)
