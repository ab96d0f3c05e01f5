"""What the commands of the tasks share: inputs of the command line or of a file, answers as JSON.

Answers are written as they come: memory holds one chunk of inputs, however long the file is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from memopt.commands.console import echo, say
from memopt.errors import ConfigurationError, InputError
from memopt.files import atomic_path
from memopt.runtimes.inputs import read_items
from memopt.visible import json_text

# Inputs answered together: some seconds of work on a small CPU.
CHUNK = 512


def given(
    values: Sequence[str], source: str | None, column: str | None, modality: str
) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each input, from the command line or from ``--input``.

    Raises:
        ConfigurationError: neither, or both.
        InputError: a row that holds no input, named.
    """
    if bool(values) == (source is not None):
        what = "both inputs and --input" if values else "nothing to answer"
        raise ConfigurationError(what, fix="give inputs, or a file or folder with --input")
    if source is None:
        yield from ((value, value) for value in values)
        return
    for number, item in enumerate(read_items(source, modality, column)):
        if item.problem:
            raise InputError(f"input {number} {item.problem}", fix="correct it, or take it out")
        yield item.label or f"input {number}", item.value


def answered(
    inputs: Iterator[tuple[str, Any]], answer: Callable[[list[Any]], Sequence[Any]]
) -> Iterator[tuple[str, Any]]:
    """Yield the name of each input and its answer, a chunk of inputs at a time.

    Raises:
        InputError: an input that cannot be answered, by its place among all of them.
    """
    before = 0
    while chunk := list(islice(inputs, CHUNK)):
        try:
            found = answer([value for _, value in chunk])
        except InputError as error:
            # An engine counts from the first input that it was given.
            place = re.match(r"input (\d+) ", error.problem)
            if not place or not before:
                raise
            problem = f"input {int(place[1]) + before} {error.problem[place.end() :]}"
            raise InputError(problem, fix=error.fix) from error
        yield from zip((name for name, _ in chunk), found, strict=True)
        before += len(chunk)


def plain(value: Any) -> Any:
    """Return an answer as plain JSON data."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value.tolist() if hasattr(value, "tolist") else value


def show(
    rows: Iterable[tuple[str, Any]],
    output: Path | None,
    as_json: bool,
    table: Callable[[list[tuple[str, Any]]], None],
) -> None:
    """Print answers as a table, or write each as a line of JSON to ``output`` or stdout.

    Raises:
        ConfigurationError: an output that is not ``.jsonl``.
    """
    if output is None and not as_json:
        table(list(rows))
        return
    with _lines(output) as write:
        for name, value in rows:
            answer = plain(value)
            fields = answer if isinstance(answer, dict) else {"answer": answer}
            write(json_text({"input": name, **fields}, indent=None))


@contextmanager
def _lines(output: Path | None) -> Iterator[Callable[[str], Any]]:
    if output is None:
        yield echo
        return
    if output.suffix != ".jsonl":
        raise ConfigurationError(
            f"output {output.name!r} has the ending {output.suffix!r}", fix="give a .jsonl file"
        )
    with atomic_path(output) as path, path.open("w", encoding="utf-8") as file:
        yield lambda line: file.write(line + "\n")
    say(f"wrote {output}")
