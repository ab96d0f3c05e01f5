"""``memopt memory reembed``: move a store to another model."""

from __future__ import annotations

import json

from memopt.commands.console import echo, stdout
from memopt.commands.memory.options import AsJson, Audio, Joint, Key, Store, Text, Vision
from memopt.commands.memory.shared import bundles, counted, open_store
from memopt.errors import ConfigurationError


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
    from memopt.memory.io.models import write_models

    models = bundles(text=model, vision=vision, audio=audio, joint=joint)
    embedder = models.open()
    if embedder is None:
        raise ConfigurationError("no new model", fix="give --model, or --joint with its encoders")
    with (
        open_store(store, embed=False, key=key) as here,
        counted("reembed") as step,
    ):
        count = here.store.reembed(embedder, on_step=step)
        write_models(here.store.place.local, models)
    with open_store(store, embed=False, key=key) as here:
        here.graph.build()
    if as_json:
        echo(json.dumps({"memories": count, "model_id": embedder.model_id}))
        return
    stdout().print(f"{count} memories moved to {embedder.model_id}")
