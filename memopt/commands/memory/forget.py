"""``memopt memory forget``: delete memories so that no file holds them any more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import echo, stdout
from memopt.commands.memory.options import AsJson, Category, Key, Since, Store, Until
from memopt.commands.memory.shared import moment, open_store
from memopt.errors import ConfigurationError


def forget(
    store: Store,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of memories.")] = None,
    category: Category = None,
    since: Since = None,
    until: Until = None,
    after_days: Annotated[
        float | None,
        typer.Option(help="Not now: keep memories of --category so many days, from now on."),
    ] = None,
    expired: Annotated[bool, typer.Option("--expired", help="What has expired.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Delete memories by id or filter, and what expired; their bytes leave the disk.

    Summaries made of them go too. Other processes may go on; a scan they began must be repeated.
    """
    from memopt.memory.model.schema import Filter
    from memopt.memory.privacy.erase import forget as run

    if after_days is not None:
        _retain(store, category or [], after_days, key=key, as_json=as_json)
        return
    filtered = bool(category or since or until)
    if not (ids or filtered or expired):
        raise ConfigurationError("nothing to forget", fix="give ids, a filter, or --expired")
    begin, end = moment(since, "since"), moment(until, "until")
    with open_store(store, embed=False, key=key) as here:
        chosen = list(ids or [])
        if chosen:
            here.store.get_many(chosen, links=False)
        if filtered:
            where = Filter(categories=tuple(category or ()), since=begin, until=end)
            for batch in here.store.scan(where, ["memory_id"], 8192):
                chosen += batch["memory_id"].to_pylist()
        if not yes and not typer.confirm(f"Delete {len(set(chosen))} memories for ever?"):
            raise typer.Exit(1)
        result = run(here.store, chosen)
    if as_json:
        counts = {"expired": result.expired, "bytes_freed": result.bytes_freed}
        echo(json.dumps({"forgotten": result.memories} | counts))
        return
    stdout().print(f"{result.memories} forgotten, {result.bytes_freed:,} bytes freed")


def _retain(
    store: str, categories: list[str], days: float, *, key: Path | None, as_json: bool
) -> None:
    from memopt.memory.lifecycle.retention import retain

    if not categories:
        raise ConfigurationError("--after-days needs a category", fix="add --category NAME")
    with open_store(store, embed=False, key=key) as here:
        changed = {name: retain(here.store, name, days) for name in categories}
    if as_json:
        echo(json.dumps({"days": days, "changed": changed}))
        return
    for name, count in changed.items():
        stdout().print(f"{name}: kept {days:g} days; {count} memories got an earlier end")
