"""How ``memopt sync`` prints: a bar while bytes move, tables after."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from memopt.commands.console import echo


@contextmanager
def moving(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal; yields what to call with the bytes done and the bytes in all."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TransferSpeedColumn,
    )

    from memopt.commands.console import stderr

    console = stderr()
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_json(document: object) -> None:
    """Print what a program reads."""
    echo(json.dumps(document))


def print_report(title: str, rows: Sequence[tuple[str, str]], document: object = None) -> None:
    """Print what was done: a title, and rows of a name and its value; or the document, if any."""
    if document is not None:
        print_json(document)
        return
    echo(title)
    print_rows(None, rows)


def print_rows(header: tuple[str, ...] | None, rows: Sequence[tuple[Any, ...]]) -> None:
    """Print a table."""
    from rich.table import Table

    from memopt.commands.console import stdout

    table = Table(*(header or ("",) * len(rows[0])), show_header=header is not None)
    for row in rows:
        table.add_row(*map(str, row))
    stdout(160).print(table)


def when(seconds: float | None) -> str:
    """Return a time in UTC, "-" for none."""
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds)) if seconds else "-"


def kind(manifest: dict[str, Any]) -> str:
    """Return a version's kind, with the version that a rollback went to."""
    target = f" to {manifest['target']}" if manifest["target"] else ""
    return f"{manifest['kind']}{target}"
