"""Where data lies: paths and URLs, listed and opened alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from memopt.errors import ConfigurationError, InputError, first_line
from memopt.extras import require
from memopt.parquetfile import check_opened, one_line

if TYPE_CHECKING:
    import pyarrow.parquet as pq


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source; ``stamp`` is its time of change in nanoseconds, None where unknown."""

    path: str
    size: int
    stamp: int | None


def is_url(place: str) -> bool:
    """Return whether a place is an URL, and not a path; ``file://`` names a path.

    >>> is_url("s3://bucket/rows"), is_url("rows.csv"), is_url("file:///rows.csv")
    (True, False, False)
    """
    return "://" in place and not place.startswith("file://")


def local_path(place: str) -> Path:
    """Return the path that a local place names.

    >>> str(local_path("file:///data/a%20b")), str(local_path("rows.csv"))
    ('/data/a b', 'rows.csv')
    """
    return Path(unquote(urlsplit(place).path) if place.startswith("file://") else place)


def filesystem(place: str) -> tuple[Any, str]:
    """Return the pyarrow file system of a place and the path in it.

    What pyarrow does not know by itself (``memory://``, ``https://``) goes through fsspec.

    Raises:
        InputError: an URL of a kind that nothing installed here can open.
    """
    fs = require("pyarrow.fs", extra="arrow", why=f"reach {place}")
    if not is_url(place):
        return fs.LocalFileSystem(), str(local_path(place).absolute())
    if urlsplit(place).scheme in ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs"):
        try:
            system, path = fs.FileSystem.from_uri(place)
            return system, str(path)
        except (OSError, ValueError, NotImplementedError) as error:
            raise InputError(f"{place} cannot be opened: {first_line(error)}") from error
    fsspec = require("fsspec", extra="jobs", why=f"reach {place}")
    try:
        system, path = fsspec.core.url_to_fs(place)
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"{place} cannot be opened: {first_line(error)}") from error
    return fs.PyFileSystem(fs.FSSpecHandler(system)), str(path)


def list_files(place: str) -> list[File]:
    """Return the files at a place, sorted by path: itself, or all below a folder.

    What begins with a dot or an underscore is no data, as for Spark, DuckDB and pyarrow.

    Raises:
        InputError: nothing is there.
    """
    from pyarrow import fs

    system, path = filesystem(place)
    try:
        found = system.get_file_info(path)
        if found.type == fs.FileType.Directory:
            entries = system.get_file_info(fs.FileSelector(path, recursive=True))
        else:
            entries = [found]
    except OSError as error:
        raise InputError(f"{place} cannot be listed: {first_line(error)}") from error
    entries = [entry for entry in entries if entry.type == fs.FileType.File]
    if found.type == fs.FileType.NotFound or not entries:
        raise InputError(f"no input {place!r}", fix="check the path")
    files = [File(entry.path, entry.size or 0, entry.mtime_ns) for entry in entries]
    return sorted(
        (file for file in files if file.path == path or not _hidden(file.path, path)),
        key=lambda file: file.path,
    )


def file_sizes(place: str) -> dict[str, int]:
    """Return the sizes in bytes of all files below a place, by their paths in it.

    Raises:
        InputError: an URL that cannot be listed.

    >>> file_sizes("/nowhere")
    {}
    """
    from pyarrow import fs

    system, root = filesystem(place)
    try:
        entries = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    except OSError as error:
        raise InputError(f"{place} cannot be listed: {first_line(error)}") from error
    files = [entry for entry in entries if entry.type == fs.FileType.File]
    return {str(PurePosixPath(file.path).relative_to(root)): file.size for file in files}


def upload(file: Path, place: str, name: str) -> None:
    """Write a file of this machine at an URL.

    Raises:
        ConfigurationError: nothing can be written there.
    """
    from pyarrow import fs

    with _writing(place, name) as (system, path):
        fs.copy_files(
            str(file), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=system
        )


def create_file(place: str, name: str) -> None:
    """Make an empty file at an URL.

    Raises:
        ConfigurationError: nothing can be written there.
    """
    with _writing(place, name) as (system, path):
        system.open_output_stream(path).close()


@contextmanager
def _writing(place: str, name: str) -> Iterator[tuple[Any, str]]:
    from pyarrow import fs

    system, root = filesystem(place)
    path = f"{root}/{name}"
    try:
        if isinstance(system, fs.PyFileSystem):  # one of fsspec may have folders
            system.create_dir(path.rpartition("/")[0], recursive=True)
        yield system, path
    except (OSError, ValueError, NotImplementedError) as error:
        raise ConfigurationError(
            f"{place}/{name} cannot be written: {first_line(error)}",
            fix="check the address and what you may do there",
        ) from error


def _hidden(path: str, folder: str) -> bool:
    inside = PurePosixPath(path.removeprefix(folder).lstrip("/"))
    return any(part.startswith((".", "_")) for part in inside.parts)


def open_table(system: Any, path: str, size: int | None = None) -> pq.ParquetFile:
    """Open a Parquet file of a pyarrow file system, its footer checked.

    Raises:
        InputError: it is gone or damaged.
    """
    import pyarrow.parquet as pq

    with one_line(Path(path), InputError):
        file = system.open_input_file(path)
        check_opened(file, file.size() if size is None else size)
        table = pq.ParquetFile(file, pre_buffer=False)
        _ = table.schema_arrow.names
    return table
