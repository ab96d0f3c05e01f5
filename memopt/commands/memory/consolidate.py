"""``memopt memory consolidate``: condense what is read often, archive what is old."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from memopt.commands.console import echo, say
from memopt.commands.memory.shared import AsJson, Key, Store, Text

if TYPE_CHECKING:
    from memopt.memory.lifecycle.worker import Saving


def consolidate(
    store: Store,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would happen.")] = False,
    llm: Annotated[
        str | None,
        typer.Option(
            help="Who writes the summaries: extractive, or ollama, anthropic, openai, each as "
            "KIND[:MODEL][@URL] [default: the settings, else extractive]."
        ),
    ] = None,
    model: Text = None,
    hot: Annotated[int | None, typer.Option(help="Accesses that make a memory hot.")] = None,
    cold_days: Annotated[float | None, typer.Option(help="Age of a cold memory.")] = None,
    at_hand: Annotated[
        int | None,
        typer.Option(help="Short-term memories at most: of more, those worth least are archived."),
    ] = None,
    similarity: Annotated[float, typer.Option(help="Least similarity within a group.")] = 0.8,
    drop: Annotated[
        bool | None,
        typer.Option("--drop/--keep", help="Originals of a summary are deleted, or archived."),
    ] = None,
    compact: Annotated[
        bool, typer.Option(help="Then drop old versions, which gives the room back.")
    ] = True,
    send_unredacted: Annotated[
        bool, typer.Option("--send-unredacted", help="Let --llm read the texts as they are.")
    ] = False,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Summarise memories that are read often, archive old ones, and show what came of it."""
    from memopt.commands.memory.shared import open_store
    from memopt.config import load_config, origins
    from memopt.memory.lifecycle import from_settings as configured
    from memopt.memory.lifecycle.consolidation import consolidate as run
    from memopt.memory.lifecycle.consolidation import plan
    from memopt.memory.lifecycle.worker import Saving, saving

    settings = load_config().consolidation
    recipe = configured.recipe(
        settings,
        hot_accesses=hot,
        cold_age_days=cold_days,
        at_hand=at_hand,
        similarity=similarity,
        originals=None if drop is None else "drop" if drop else "archive",
        duty=1.0,
    )
    given = {"text": model}
    with open_store(store, given=given, key=key) as here:
        memories = here.store
        writer = configured.summariser(
            settings,
            "extractive" if dry_run else llm,
            redact=None if send_unredacted else memories.redact,
            where=origins(),
            say=say,
        )
        if dry_run:
            size = memories.stats().bytes_on_disk
            saved = Saving(report=plan(memories, recipe), before=size, after=size)
        else:
            with _progress() as step:
                saved = saving(
                    memories,
                    lambda: run(memories, recipe, llm=writer, on_step=step),
                    drop_versions=compact,
                )
        events = [
            event.detail
            for event in memories.events("consolidation-failed")
            if event.retry_at and event.retry_at > memories.database.now()
        ]
    if as_json:
        echo(json.dumps(document(saved, events), indent=1))
    else:
        tell(saved, events)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from memopt.commands.console import stderr

    console = stderr()
    columns = (TextColumn("consolidate"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("consolidate", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def document(saved: Saving, events: list[str]) -> dict[str, object]:
    report = saved.report
    return {
        "dry_run": report.dry_run,
        "scanned": report.plan.scanned,
        "hot": report.plan.hot,
        "cold": report.plan.cold,
        "groups": [list(group.ids) for group in report.plan.groups],
        "alone": report.plan.alone,
        "postponed": report.plan.postponed,
        "summaries": list(report.summaries),
        "condensed": report.condensed,
        "archived": report.archived,
        "expired": report.expired,
        "fallbacks": report.fallbacks,
        "failed": report.failed,
        "stale": report.stale,
        "waiting": events,
        "bytes_before": saved.before,
        "bytes_after": saved.after,
        "seconds": round(report.seconds, 3),
    }


def tell(saved: Saving, events: list[str]) -> None:
    from rich.table import Table

    from memopt.commands.console import stdout

    report, before, after = saved.report, saved.before, saved.after
    console = stdout(100)
    what = "would happen" if report.dry_run else "happened"
    table = Table("short-term memories", "count", f"what {what}", title="consolidation")
    groups = len(report.plan.groups)
    made = f"{groups} summaries" if report.dry_run else f"{len(report.summaries)} summaries"
    table.add_row("scanned", str(report.plan.scanned), "")
    table.add_row("hot", str(report.plan.hot), f"{report.condensed} condensed to {made}")
    table.add_row("hot, like no other", str(report.plan.alone), "stay as they are")
    table.add_row("cold", str(report.plan.cold), f"{report.archived} archived")
    table.add_row("postponed", str(report.plan.postponed), "failed before, retried later")
    if not report.dry_run:
        table.add_row("expired", str(report.expired), "erased from the disk")
        table.add_row("batches failed", str(report.failed), "originals untouched, retried later")
        table.add_row("batches overtaken", str(report.stale), "changed meanwhile, next run")
        table.add_row("summaries extracted", str(report.fallbacks), "the language model failed")
    console.print(table)
    if not report.dry_run and before and after is not None:
        console.print(
            f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB on disk "
            f"({1 - after / before:.0%} saved) in {report.seconds:.1f} s"
        )
    for detail in events:
        console.print(f"waiting to be retried: {detail}")
