"""``memopt memory worker``: consolidate by schedule and by size, until it is told to stop."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from memopt.commands.console import echo, say
from memopt.commands.memory.consolidate import tell
from memopt.commands.memory.options import AsJson, Key, SendUnredacted, Store, Text
from memopt.commands.memory.shared import bundles, open_store
from memopt.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from memopt.memory.lifecycle.consolidation import Consolidation
    from memopt.memory.lifecycle.worker import ConsolidationWorker
    from memopt.memory.memory_store import MemoryStore


def worker(
    store: Store,
    once: Annotated[
        bool, typer.Option("--once", help="Look once, run if it is time, and end.")
    ] = False,
    poll: Annotated[float, typer.Option(help="Seconds between two looks.")] = 30.0,
    llm: Annotated[
        str | None,
        typer.Option(help="Who writes the summaries, as of consolidate [default: the settings]."),
    ] = None,
    model: Text = None,
    send_unredacted: SendUnredacted = False,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Consolidate when the settings say: by schedule, and when the store has grown too large.

    What starts a run and what it does are ``consolidation.*`` of the settings. Ctrl-C or SIGTERM
    end it after the batch at work.
    """
    import asyncio

    from memopt.config import load_config, origins
    from memopt.memory.lifecycle import from_settings as configured
    from memopt.memory.lifecycle.schedule import due
    from memopt.memory.lifecycle.worker import ConsolidationWorker

    settings = load_config().consolidation
    triggers = configured.triggers(settings)
    if triggers.cron is None and triggers.pressure_mb is None:
        raise ConfigurationError(
            "consolidation.time_based_enabled and pressure_based_enabled are both false: nothing "
            "would start a run",
            fix="switch one on, or run: memopt memory consolidate",
        )

    with open_store(store, models=bundles(text=model), key=key) as here:
        memories = here.store
        redact = None if send_unredacted else memories.redact
        writer = configured.summariser(settings, llm, redact=redact, where=origins(), say=say)

        around = partial(_run, memories, as_json=as_json)
        condenser = ConsolidationWorker(
            memories,
            configured.recipe(settings),
            triggers=triggers,
            llm=writer,
            poll_s=poll,
            around=around,
        )
        if once:
            why = due(memories, triggers)
            if why is None:
                say("nothing to do: neither the schedule nor the size starts a run now")
                return
            around(why, lambda: asyncio.run(condenser.consolidate()))
            return
        by = [f"schedule {triggers.cron!r} (UTC)"] if triggers.cron else []
        by += [f"more than {triggers.pressure_mb:g} MB"] if triggers.pressure_mb else []
        say(f"watching {memories.place}: {', '.join(by)}; Ctrl-C ends it")
        asyncio.run(_watch(condenser))
        say("stopped")


def _run(store: MemoryStore, why: str, run: Callable[[], Consolidation], *, as_json: bool) -> None:
    """Consolidate once and print what came of it."""
    from memopt.memory.lifecycle.worker import document, saving

    saved = saving(store, run)
    now = store.database.now()
    if as_json:
        line = {"why": why, "at": now.isoformat()}
        echo(json.dumps(line | document(saved, [])))
    else:
        echo(f"{now:%Y-%m-%d %H:%M:%S} by {why}")
        tell(saved, [])


async def _watch(condenser: ConsolidationWorker) -> None:
    """Let it work until Ctrl-C or SIGTERM."""
    import asyncio
    import signal

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await condenser.start()
    await stop.wait()
    await condenser.stop()
