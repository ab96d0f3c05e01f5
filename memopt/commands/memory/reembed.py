"""``memopt memory reembed``: move a store to another model."""

from __future__ import annotations

import json

from memopt.commands.console import echo
from memopt.commands.memory.shared import AsJson, Audio, Joint, Key, Store, Text, Vision


def reembed(
    store: Store,
    model: Text = None,
    vision: Vision = None,
    audio: Audio = None,
    joint: Joint = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Embed every memory with other bundles; searchable all the while, resumable after a kill."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from memopt.bundle import open_bundle
    from memopt.commands.console import stderr, stdout
    from memopt.commands.memory.shared import open_store
    from memopt.errors import ConfigurationError
    from memopt.memory.io.models import Models, remember

    given = {"text": model, "vision": vision, "audio": audio, "joint": joint}
    models = Models(**{k: str(open_bundle(v).path.resolve()) for k, v in given.items() if v})
    embedder = models.open()
    if embedder is None:
        raise ConfigurationError("no new model", fix="give --model, or --joint with its encoders")
    console = stderr()
    with (
        open_store(store, embed=False, key=key) as here,
        Progress(
            TextColumn("reembed"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as bar,
    ):
        task = bar.add_task("reembed", total=None)
        count = here.store.reembed(
            embedder, on_step=lambda done, total: bar.update(task, completed=done, total=total)
        )
        remember(here.store.place.local, models)
    with open_store(store, embed=False, key=key) as here:
        here.graph.build()
    if as_json:
        echo(json.dumps({"memories": count, "model_id": embedder.model_id}))
        return
    stdout().print(f"{count} memories moved to {embedder.model_id}")
