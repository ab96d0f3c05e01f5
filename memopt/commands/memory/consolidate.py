"""``memopt memory consolidate``: condense what is read often, archive what is old."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from memopt.commands.console import echo, say, stdout
from memopt.commands.memory.options import AsJson, Key, SendUnredacted, Store, Text
from memopt.commands.memory.shared import bundles, counted, open_store

if TYPE_CHECKING:
    from memopt.memory.lifecycle.worker import Saving


def consolidate(
    store: Store,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would happen.")] = False,
    llm: Annotated[
        str | None,
        typer.Option(
            help="Who writes the summaries: extractive, or ollama, anthropic, openai, each as "
            "KIND[:MODEL][@URL], or memopt:BUNDLE, which runs here [default: the settings, else "
            "extractive]."
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
    send_unredacted: SendUnredacted = False,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Summarise memories that are read often, archive old ones, and show what came of it."""
    from memopt.config import load_config, origins
    from memopt.memory.lifecycle import consolidation, from_settings, worker

    settings = load_config().consolidation
    recipe = from_settings.recipe(
        settings,
        hot_accesses=hot,
        cold_age_days=cold_days,
        at_hand=at_hand,
        similarity=similarity,
        originals=None if drop is None else "drop" if drop else "archive",
        duty=1.0,
    )
    with open_store(store, models=bundles(text=model), key=key) as here:
        memories = here.store
        redact = None if send_unredacted else memories.redact
        spec = "extractive" if dry_run else llm
        writer = from_settings.summariser(settings, spec, redact=redact, where=origins(), say=say)
        if dry_run:
            report, size = consolidation.plan(memories, recipe), memories.stats().bytes_on_disk
            saved = worker.Saving(report=report, before=size, after=size)
        else:
            run = partial(consolidation.consolidate, memories, recipe, llm=writer)
            with counted("consolidate") as step:
                saved = worker.saving(memories, partial(run, on_step=step), drop_versions=compact)
        events = worker.waiting(memories)
    if as_json:
        echo(json.dumps(worker.document(saved, events), indent=1))
    else:
        tell(saved, events)


def tell(saved: Saving, events: list[str]) -> None:
    from rich.table import Table

    report, before, after = saved.report, saved.before, saved.after
    console = stdout(100)
    what = "would happen" if report.dry_run else "happened"
    table = Table("short-term memories", "count", f"what {what}", title="consolidation")
    plan = report.plan
    texts = len(plan.groups if report.dry_run else report.summaries)
    rows = [
        ("scanned", plan.scanned, ""),
        ("hot", plan.hot, f"{report.condensed} condensed to {texts} summaries"),
        ("hot, like no other", plan.alone, "stay as they are"),
        ("cold", plan.cold, f"{report.archived} archived"),
        ("postponed", plan.postponed, "failed before, retried later"),
        ("expired", report.expired, "erased from the disk"),
        ("batches failed", report.failed, "originals untouched, retried later"),
        ("batches overtaken", report.stale, "changed meanwhile, next run"),
        ("summaries extracted", report.fallbacks, "the language model failed"),
    ]
    for name, number, meaning in rows[: 5 if report.dry_run else None]:
        table.add_row(name, str(number), meaning)
    console.print(table)
    if not report.dry_run and before and after is not None:
        console.print(
            f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB on disk "
            f"({1 - after / before:.0%} saved) in {report.seconds:.1f} s"
        )
    for detail in events:
        console.print(f"waiting to be retried: {detail}")
