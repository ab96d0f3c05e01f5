"""Fifty facts, each said in twenty ways by rules, and asked for in other words."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

_WHO = ("Ann", "Bob", "Carla", "Dinesh", "Eva", "Farid", "Greta", "Hugo", "Ines", "Jonas")
# A thing and another word for it, where it is and another word for that.
_THINGS = (
    ("bicycle", "bike", "shed", "garden hut"),
    ("passport", "travel document", "drawer", "desk"),
    ("guitar", "string instrument", "attic", "room under the roof"),
    ("camera", "device for photos", "cupboard", "cabinet"),
    ("umbrella", "thing against rain", "hallway", "corridor"),
)
_TELLING = (
    "{who} keeps the {thing} in the {place}.",
    "{who} kept the {thing} in the {place}.",
    "The {thing} of {who} is in the {place}.",
    "In the {place} you will find the {thing} that belongs to {who}.",
    "{who}'s {thing} was put into the {place}.",
    "It is the {place} where {who} stores the {thing}.",
    "{who} said: my {thing} stays in the {place}.",
    "If you need the {thing} of {who}, look in the {place}.",
    "By the way, {who} has left a {thing} in the {place}.",
    "The {place} holds the {thing} {who} owns.",
)


@dataclass(frozen=True)
class Fact:
    """What is true, how it was told, and a question for it.

    Attributes:
        name: of no use but to tell facts apart.
        told: twenty texts that say it, all different.
        question: asks for it in words of its own.
    """

    name: str
    told: tuple[str, ...]
    question: str


def facts() -> list[Fact]:
    """Return the facts, the same in every run."""
    found = []
    for who, (thing, other, place, elsewhere) in product(_WHO, _THINGS):
        told = tuple(
            way.format(who=who, thing=word, place=where)
            for way in _TELLING
            for word, where in ((thing, place), (other, elsewhere))
        )
        found.append(Fact(f"{who} {thing}", told, f"Where would I look for {who}'s {other}?"))
    return found
