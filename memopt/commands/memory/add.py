"""``memopt memory add``: keep texts, pictures and sounds."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memopt.commands.console import echo, progress, stderr, stdout
from memopt.commands.memory.options import AsJson, Audio, Joint, Key, Redaction, Store, Text, Vision
from memopt.commands.memory.shared import bundles, moment, open_store
from memopt.errors import InputError
from memopt.records import Record, ending, open_records, read_lines

if TYPE_CHECKING:
    from memopt.memory.model.schema import NewMemory

_PICTURES, _SOUNDS = (".png", ".jpg", ".jpeg"), (".wav",)
_TABLES = (".csv", ".tsv")
_FILES = (*_PICTURES, *_SOUNDS, *_TABLES, ".txt", ".jsonl", ".parquet")
# One word that ends so is a file somebody meant, not a memory.
_OTHER_FILES = (
    *(".md", ".rst", ".log", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".html", ".htm", ".xml"),
    *(".json", ".yaml", ".yml", ".zip", ".gz", ".tar", ".xlsx", ".npy", ".arrow", ".mp4", ".mov"),
    *(".gif", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".mp3", ".flac", ".ogg", ".m4a", ".opus"),
)
_FIELDS = ("memory_id", "text", "image", "audio", "category", "timestamp", "expires_at")


def add(
    store: Store,
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Texts, files (.txt one memory a line, .png .jpg .wav .csv .tsv .jsonl .parquet), "
            "or - for lines of standard input."
        ),
    ],
    category: Annotated[str, typer.Option(help="Category of what names none itself.")] = "",
    time: Annotated[str | None, typer.Option(help="When it happened [default: now].")] = None,
    expires: Annotated[str | None, typer.Option(help="ISO time after which it is gone.")] = None,
    model: Text = None,
    vision: Vision = None,
    audio: Audio = None,
    joint: Joint = None,
    key: Key = None,
    redaction: Redaction = "auto",
    as_json: AsJson = False,
) -> None:
    """Add memories; what is there already is left as it is."""
    from rich.progress import TimeElapsedColumn

    from memopt.memory.store.creation import unmade_on_error

    for source in sources:
        _check(source)
    at, until = moment(time, "time"), moment(expires, "expires")
    models = bundles(text=model, vision=vision, audio=audio, joint=joint)
    with (
        unmade_on_error(store),
        open_store(store, create=True, models=models, key=key, redaction=redaction) as here,
        progress("{task.completed} memories", TimeElapsedColumn()) as step,
    ):

        def watched() -> Iterator[NewMemory]:
            for memory in read(sources, category=category, timestamp=at, expires_at=until):
                yield memory
                step(advance=1)

        result = here.store.add(watched())
        here.store.index.ensure()
    if as_json:
        echo(json.dumps(asdict(result), indent=1))
        return
    stdout().print(f"{result.added} added, {result.already} there already")
    if result.differing:
        stderr().print(
            f"warning: {len(result.differing)} ids hold other content, which stays; "
            f"first {result.differing[0]}"
        )


def read(sources: list[str], *, category: str, **times: datetime | None) -> Iterator[NewMemory]:
    """Yield the memories of texts and files, in order.

    Raises:
        InputError: a file that is missing or cannot be read, naming it and the line.
    """
    from memopt.memory.model.schema import Content, NewMemory

    usual: dict[str, Any] = {"category": category, **times}
    for source in sources:
        _check(source)
        path = Path(source)
        suffix = ending(path)
        if source == "-":
            yield from _lines(read_lines(sys.stdin.buffer, "the input"), usual)
        elif suffix not in _FILES or "\n" in source:
            yield NewMemory(content=Content(text=source), **usual)
        elif suffix in _PICTURES:
            yield NewMemory(content=Content(vision=path.read_bytes()), origin=source, **usual)
        elif suffix in _SOUNDS:
            yield NewMemory(content=Content(audio=path.read_bytes()), origin=source, **usual)
        elif suffix == ".txt":
            yield from _lines(open_records(path), usual)
        else:
            yield from _rows(path, usual)


def _check(source: str) -> None:
    """Refuse a name of a file that would be kept as a text, before anything is stored.

    Raises:
        InputError: it is there, or is written as a path, and is of no kind that is read.
    """

    if source == "-" or "\n" in source:
        return
    suffix = ending(Path(source))
    if suffix in _FILES:
        if not os.path.isfile(source):
            raise InputError(f"{source} is no file", fix="check the path")
        return
    kind = f"a folder or a file of a kind that is not read ({', '.join(_FILES)} are)"
    words = f"for its text: memopt memory add STORE - < {source}"
    if os.path.exists(source):
        raise InputError(f"{source} is {kind}", fix=words)
    one_word = not any(letter.isspace() for letter in source)
    if one_word and "://" not in source:
        written_as_path = source.startswith(("/", "./", "../", "~/"))
        if suffix in _OTHER_FILES or (written_as_path and suffix):
            raise InputError(
                f"{source} is the name of a file that is not there",
                fix="check the path; if it is a memory, give it on standard input: add STORE -",
            )


def _lines(records: Iterable[Record], usual: dict[str, Any]) -> Iterator[NewMemory]:
    from memopt.memory.model.schema import Content, NewMemory

    for record in records:
        if text := record.values["text"].strip():
            yield NewMemory(content=Content(text=text), origin=record.where, **usual)


def _rows(path: Path, usual: dict[str, Any]) -> Iterator[NewMemory]:
    for record in open_records(path):
        if record.problem:
            raise InputError(f"{record.where} {record.problem}")
        values: dict[str, Any] = dict(record.values)
        if ending(path) in _TABLES:
            # An empty cell of a table is nothing, not an empty text or time.
            values = {name: value for name, value in values.items() if value}
        yield _entry(values, path, record.where, usual)


def _entry(entry: Mapping[str, Any], path: Path, where: str, usual: dict[str, Any]) -> NewMemory:
    """Return the memory of one row; media are paths or bytes."""
    from memopt.memory.model.schema import Content, NewMemory

    renamed = {"vision_data": "image", "audio_data": "audio"}
    entry = {str(renamed.get(k, k)): value for k, value in entry.items() if value is not None}
    unknown = sorted(set(entry) - set(_FIELDS))
    if unknown:
        raise InputError(
            f"{where} has the unknown field {unknown[0]!r}", fix=f"use {', '.join(_FIELDS)}"
        )
    media = {}
    for name in ("image", "audio"):
        value = entry.get(name)
        if isinstance(value, str):
            file = path.parent / value
            if not file.is_file():
                raise InputError(f"{where}: {name} {value} is no file")
            value = file.read_bytes()
        media[name] = value
    times: dict[str, Any] = {
        name: moment(entry[name], name) if isinstance(entry[name], str) else entry[name]
        for name in ("timestamp", "expires_at")
        if name in entry
    }
    content = Content(text=entry.get("text"), vision=media["image"], audio=media["audio"])
    own: dict[str, Any] = {name: entry[name] for name in ("memory_id", "category") if name in entry}
    return NewMemory(content=content, origin=where, **{**usual, **own, **times})
