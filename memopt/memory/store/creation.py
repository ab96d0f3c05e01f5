"""Making a store, and checking that what is opened is whole and ours."""

from __future__ import annotations

import base64
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from memopt.errors import ConsolidationError, MemoptError, first_line
from memopt.memory.model import payload
from memopt.memory.model.schema import (
    ACCESS_LOG,
    DEFAULT_DIM,
    EDGES,
    EVENTS,
    FORMAT_VERSION,
    PLAIN_FORMAT,
    WORDS,
    Embedder,
    memories_schema,
)
from memopt.memory.store.locking import LOCK_FILE, READ_FILE, ReadOnlyError, lock_of
from memopt.memory.store.meta import META_FILE, MODELS_FILE, TABLES, Location, Meta

_ID_KEY_BYTES = 32
# This process and those it comes from that were forked after LanceDB began its threads.
_BEHIND: list[int] = []
# How the services of Amazon, Google and Azure refuse a write, as Lance quotes it.
_REFUSED = re.compile(r"\b403\b|AccessDenied|Permission ?Denied|Forbidden", re.IGNORECASE)


class IdKey(NamedTuple):
    """The secret of an encrypted store, b'' of a plain one.

    Attributes:
        value: the key of the content hashes, and of what ties cells to this store.
        only_tied: every cell of the store is tied to its row. That is said where only a key can
            say it, so that nobody without one makes the store take loose cells again.
    """

    value: bytes = b""
    only_tied: bool = False


def make(
    place: Location,
    database: Any,
    dim: int | None,
    embedder: Embedder | None,
    cipher: payload.Cipher | None,
    now: datetime,
) -> Meta:
    """Create the tables, then ``memory.json``: only with it is there a store.

    A creation that was cut short is finished by the next one.
    """
    dim = dim or (embedder.dim if embedder else DEFAULT_DIM)
    schemas = (memories_schema(dim).append(WORDS), EDGES, ACCESS_LOG, EVENTS)
    for name, schema in zip(TABLES, schemas, strict=True):
        count = _row_count(database, name)
        if count:
            raise ConsolidationError(
                f"{place} has a table {name!r} with rows and no memory.json",
                fix="restore memory.json from a copy, or choose another folder",
            )
        database.create_table(name, schema=schema, mode="create" if count is None else "overwrite")
    # With a key, two merges at once that insert the same id are a conflict, and one is repeated.
    database.open_table("memories").set_unenforced_primary_key("memory_id")
    create_indices(database)
    meta = Meta(
        format=FORMAT_VERSION if cipher else PLAIN_FORMAT,
        dim=dim,
        model_id=embedder.model_id if embedder else "",
        created_at=now.isoformat(),
        key_id=cipher.key_id if cipher else None,
        id_key=seal_id_key(os.urandom(_ID_KEY_BYTES), cipher) if cipher else None,
    )
    place.write(meta)
    return meta


def create_indices(database: Any) -> None:
    """Give a store its id and word indices where it has none; they grow with optimize()."""
    from lancedb.index import FTS, BTree

    memories = database.open_table("memories")
    present = {column for index in memories.list_indices() for column in index.columns}
    configs: dict[str, Any] = {"memory_id": BTree()}
    if WORDS.name in memories.schema.names:
        # memopt.memory.model.words made them: nothing is left to split, fold or leave out.
        configs[WORDS.name] = FTS(
            base_tokenizer="whitespace",
            lower_case=False,
            stem=False,
            remove_stop_words=False,
            ascii_folding=False,
        )
    for column, config in configs.items():
        if column not in present:
            memories.create_index(column, config=config)
    edges = database.open_table("edges")
    if not edges.list_indices():
        edges.create_index("source", config=BTree())
        edges.create_index("target", config=BTree())


@contextmanager
def unmade_on_error(path: str | Path) -> Iterator[None]:
    """Take back a local store that the block made and put nothing into, if the block raises.

    What was there before the block, and a store with a memory of anybody in it, stays.

    >>> import tempfile
    >>> from memopt.memory.memory_store import MemoryStore
    >>> folder = Path(tempfile.mkdtemp()) / "store"
    >>> with unmade_on_error(folder), MemoryStore(folder, dim=8):
    ...     raise ValueError("no such file")
    Traceback (most recent call last):
    ...
    ValueError: no such file
    >>> folder.exists()
    False
    """
    folder = Location(path).local
    was_there = folder is not None and folder.is_dir()
    if folder is None or (folder.exists() and (not was_there or any(folder.iterdir()))):
        yield
        return
    try:
        yield
    except BaseException:
        if folder.is_dir():
            _unmake(folder)
            if not was_there and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _unmake(folder: Path) -> None:
    import lancedb

    names = [f"{name}.lance" for name in TABLES]
    with lock_of(folder).held():
        database = lancedb.connect(folder)
        if any(_row_count(database, name) for name in ("memories", "edges")):
            return
        # Without memory.json it is a creation that was cut short, should this be cut short too.
        for file in (META_FILE, MODELS_FILE):
            (folder / file).unlink(missing_ok=True)
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)
        for file in (READ_FILE, LOCK_FILE):
            (folder / file).unlink(missing_ok=True)


def check_forked(lancedb: Any) -> None:
    """Refuse a LanceDB whose threads stayed behind when this process was forked.

    It begins new ones in the child; still a merge in a child now and then waited for ever (0.40).

    Raises:
        ConsolidationError: the process was forked from one that had a store open.
    """
    if _BEHIND:
        raise ConsolidationError(
            f"lancedb {lancedb.__version__} was in use before this process was forked, and may "
            "hang in it",
            fix="start processes by 'spawn' or 'forkserver', or open no store before the fork",
        )


def _notice_fork() -> None:
    if "lancedb.background_loop" in sys.modules:
        _BEHIND.append(os.getpid())


os.register_at_fork(after_in_child=_notice_fork)


def table(place: Location, database: Any, name: str) -> Any:
    """Open one table.

    Raises:
        ConsolidationError: it is missing or damaged.
    """
    with _whole(place, name):
        return database.open_table(name)


def seal_id_key(key: bytes, cipher: payload.Cipher) -> str:
    """Return ``key``, as :func:`id_key` gave it, encrypted for ``memory.json``; base64.

    From then on the store takes no cell that is not tied to its row.
    """
    return base64.b64encode(cipher.encrypt(payload.tie(key, "", "id_key", "", b""))).decode()


def reader(place: Location, name: str, options: dict[str, Any]) -> Any:
    """Open one table for asynchronous queries.

    Raises:
        ConsolidationError: it is missing or damaged.
    """
    import lancedb
    from lancedb.background_loop import LOOP

    async def open_table() -> Any:
        database = await lancedb.connect_async(place.uri, **options)
        return await database.open_table(name)

    with _whole(place, name):
        return LOOP.run(open_table())


def id_key(place: Location, meta: Meta, cipher: payload.Cipher | None) -> IdKey:
    """Return the secret of a store; opening it proves the encryption key.

    Raises:
        ConsolidationError: no key or a wrong one for an encrypted store, or a key for a plain one.
    """
    if meta.id_key is None:
        if cipher is None:
            return IdKey()
        raise ConsolidationError(
            f"{place} is not encrypted, and a key was given",
            fix="open it without a key, or import its export into a new encrypted store",
        )
    if cipher is None:
        raise ConsolidationError(
            f"{place} is encrypted with key {meta.key_id!r} and no key was given",
            fix="open the store with its key",
        )
    data = payload.open_secret(cipher, base64.b64decode(meta.id_key), meta.key_id)
    if not payload.is_tied(data):
        return IdKey(data)
    own = payload.untie(data, "", "id_key", "", b"")
    if own is None:
        raise ConsolidationError(
            f"{place} was changed from outside: its {META_FILE} holds another secret",
            fix="restore it from a copy",
        )
    return IdKey(own, only_tied=True)


@contextmanager
def named_errors(place: Location, what: str) -> Iterator[None]:
    """Turn what Lance raises when a file cannot be written or read into one clear line.

    Raises:
        ReadOnlyError: an object store lets this user read only.
        ConsolidationError: instead of OSError, RuntimeError or ValueError.
    """
    try:
        yield
    except MemoptError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        # Rust adds the place in its own source, which tells a user nothing.
        reason = reason.partition(", /")[0].partition(": rust/")[0]
        # A local store says it by its lock, before anything is tried.
        refused = place.local is None and _REFUSED.search(str(error)) is not None
        kind = ReadOnlyError if refused and what == "changed" else ConsolidationError
        raise kind(
            f"{place} could not be {what}: {reason}",
            fix="check free space and permissions, then: memopt memory verify",
        ) from error


def _row_count(database: Any, name: str) -> int | None:
    try:
        return int(database.open_table(name).count_rows())
    except ValueError:
        # Not there, or cut short before its first version: nothing was acknowledged in it.
        return None


@contextmanager
def _whole(place: Location, name: str) -> Iterator[None]:
    """Say that a table is damaged where it cannot be opened."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        reason = first_line(error)
        raise ConsolidationError(
            f"{place} is damaged: its table {name!r} cannot be opened ({reason})",
            fix="restore it from a copy",
        ) from error
