"""The parts of a destination: one file a fragment, here or at an URL."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.files import atomic_path, publish, sha256_file
from memopt.jobs.places import is_url, upload
from memopt.jobs.source import VECTOR

if TYPE_CHECKING:
    import pyarrow as pa


def write_part(kind: str, place: str, number: int, rows: pa.Table) -> dict[str, Any]:
    """Write the rows of one fragment, durably and under a name of its number alone.

    Args:
        kind: lance, else Parquet.
        place: a folder, or an URL.
        number: of the fragment.
        rows: what is written.

    Returns:
        What the commit needs: the file, its size and its hash.
    """
    write = _write_lance if kind == "lance" else _write_parquet
    if not is_url(place):
        return write(Path(place), number, rows)
    with tempfile.TemporaryDirectory(prefix="memopt-part-") as folder:
        note = write(Path(folder), number, rows)
        upload(Path(folder) / note["file"], place, note["file"])
    return note


def _write_parquet(folder: Path, number: int, rows: pa.Table) -> dict[str, Any]:
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
