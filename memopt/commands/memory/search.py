"""``memopt memory search``: find memories from a text, a picture, a sound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memopt.commands.console import echo, stdout
from memopt.commands.memory.options import AsJson, Category, Key, Since, Store, Until
from memopt.commands.memory.shared import moment, open_store, preview
from memopt.errors import InputError
from memopt.visible import json_text

if TYPE_CHECKING:
    from memopt.memory.graph.retriever import Retrieved


def search(
    store: Store,
    text: Annotated[str | None, typer.Argument(help="Words, or what it is about.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to search with.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A sound to search with.")] = None,
    top_k: Annotated[int, typer.Option(help="How many.")] = 10,
    association: Annotated[bool, typer.Option(help="Follow the association graph.")] = True,
    alpha: Annotated[float, typer.Option(help="Weight of the similarity.")] = 0.7,
    beta: Annotated[
        float | None,
        typer.Option(help="Weight of the association; 0.3, and 0.1 where there is a text."),
    ] = None,
    category: Category = None,
    tier: Annotated[list[str] | None, typer.Option(help="short_term, long_term, archived.")] = None,
    modality: Annotated[str | None, typer.Option(help="text, vision or audio.")] = None,
    since: Since = None,
    until: Until = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Find memories by meaning and by what they are associated with."""
    from memopt.memory.model.content import check_content
    from memopt.memory.model.schema import Content, Filter, as_dict

    where = Filter(
        categories=tuple(category or ()),
        tiers=tuple(tier or ()),
        modality=modality,
        since=moment(since, "since"),
        until=moment(until, "until"),
    )
    picture, sound = _bytes(image), _bytes(audio)
    # Here, where the names of the files are known.
    if picture is not None:
        check_content(Content(vision=picture), str(image))
    if sound is not None:
        check_content(Content(audio=sound), str(audio))
    with open_store(store, key=key) as here:
        found = here.retriever.retrieve(
            text,
            vision=picture,
            audio=sound,
            top_k=top_k,
            enable_association=association,
            alpha=alpha,
            beta=beta,
            where=where,
        )
    if as_json:
        scores = ("similarity", "association_score", "final_score")
        rows = [
            {name: round(getattr(result, name), 6) for name in scores}
            | as_dict(result.memory, links=False)
            for result in found
        ]
        echo(json_text(rows))
        return
    _print(found)


def _print(found: list[Retrieved]) -> None:
    from rich.table import Table

    table = Table("score", "similarity", "association", "memory", "category", "when", "id")
    for result in found:
        memory = result.memory
        numbers = (result.final_score, result.similarity, result.association_score)
        what = (preview(memory), memory.category, f"{memory.timestamp:%Y-%m-%d %H:%M}")
        table.add_row(*(f"{number:.3f}" for number in numbers), *what, memory.memory_id)
    stdout(180).print(table if found else "nothing found")


def _bytes(path: Path | None) -> bytes | None:

    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
