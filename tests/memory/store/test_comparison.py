"""Adding again: compared with what is there now, not with what was once added."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import InputError
from memopt.memory.lifecycle.retention import retain
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model import content as incoming
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.privacy.keys import AesGcm
from tests.memory.kit import Clock, Hashing, note, png

HOUR = timedelta(hours=1)


@pytest.fixture
def clock() -> Clock:
    return Clock(datetime(2026, 1, 1, 12, tzinfo=UTC))


@pytest.fixture(params=["plain", "encrypted", "uri"])
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> MemoryStore:
    place = f"shared-memory://{tmp_path.name}" if request.param == "uri" else tmp_path / "s"
    cipher = AesGcm((bytes(32),)) if request.param == "encrypted" else None
    return MemoryStore(place, embedder=Hashing(), cipher=cipher, clock=clock, background=False)


def new(text: str, **fields: object) -> NewMemory:
    return NewMemory(content=Content(text=text), **fields)  # type: ignore[arg-type]


def texts(store: MemoryStore) -> list[str | None]:
    found = store.search(np.ones(store.dim), top_k=50, touch=False)
    return sorted(hit.memory.text or "" for hit in found)


def test_a_text_that_was_changed_can_be_added_again(store: MemoryStore) -> None:
    """Each of its ids may be taken by another text; once it is there it is there already."""
    first = store.add(new("the code is red")).ids[0]
    store.update(first, text="the code is blue")
    second = store.add([new("the code is red"), new("the code is red")])
    assert (second.added, second.already, second.ids[0] == second.ids[1]) == (1, 1, True)
    store.update(second.ids[0], text="the code is green")
    third = store.add(new("the code is red"))
    again = store.add(new("the code is red"))
    assert (third.added, again.already, again.ids) == (1, 1, third.ids)
    assert texts(store) == ["the code is blue", "the code is green", "the code is red"]
    # The first id holds the text once more: that is the one.
    store.update(first, text="the code is red")
    assert store.add(new("the code is red")).ids == (first,)


def test_a_picture_or_category_that_was_changed_too(store: MemoryStore) -> None:
    """The whole content is compared, and the category it was added in."""
    picture = NewMemory(content=Content(vision=png(1)))
    key = store.add(picture).ids[0]
    store.update(key, vision_data=png(2))
    assert store.add(picture).added == 1
    other = store.add(new("a door", category="house")).ids[0]
    store.update(other, category="garden")
    assert store.add(new("a door", category="house")).added == 1


def test_what_is_archived_or_condensed_is_there(store: MemoryStore) -> None:
    """Packed content is compared as it was."""
    key = store.add(new("an old door")).ids[0]
    store.commit(updates=store.cells.pack(store.rows([key])))
    assert store.add(new("an old door")).already == 1


def test_an_expired_memory_is_not_there(store: MemoryStore, clock: Clock) -> None:
    """Its place is taken by the new one, with nothing of the old: links, counts, its own id."""
    ends = clock.now + HOUR
    ids = store.add([new("plumber", expires_at=ends), note("mine", expires_at=ends)]).ids
    store.touch(ids)
    store.flush()
    clock.now += 2 * HOUR
    again = store.add([new("plumber"), note("mine")])
    assert (again.added, again.ids) == (2, ids)
    assert texts(store) == ["mine", "plumber"]
    assert store.get(ids[0]).access_count == 0
    assert store.count() == 2


def test_an_expired_memory_cannot_be_updated(store: MemoryStore, clock: Clock) -> None:
    """It would be changed for nobody, or come back."""
    key = store.add(new("plumber", expires_at=clock.now + HOUR)).ids[0]
    clock.now += 2 * HOUR
    for fields in ({"text": "x"}, {"expires_at": clock.now + HOUR}):
        with pytest.raises(InputError, match="has expired"):
            store.update(key, **fields)


def test_adding_again_puts_the_end_off(store: MemoryStore, clock: Clock) -> None:
    """To the later of both, for ever where one has none; never to the earlier."""
    start = clock.now
    key = store.add(new("a", expires_at=start + HOUR)).ids[0]
    for end, expected in ((3, 3), (2, 3), (None, None), (5, None)):
        result = store.add(new("a", expires_at=None if end is None else start + end * HOUR))
        assert (result.added, result.already) == (0, 1)
        assert store.get(key).expires_at == (None if expected is None else start + expected * HOUR)


def test_twice_in_one_call_the_later_end_counts(store: MemoryStore, clock: Clock) -> None:
    """Whichever comes first."""
    soon = clock.now + HOUR
    result = store.add([new("a", expires_at=soon), new("b"), new("a"), new("b", expires_at=soon)])
    assert (result.added, result.already) == (2, 2)
    assert [store.get(key).expires_at for key in set(result.ids)] == [None, None]


def test_a_policy_renews_what_is_added_again(store: MemoryStore, clock: Clock) -> None:
    """So many days after it happened the last time."""
    retain(store, "visitors", 2)
    key = store.add(new("ann", category="visitors")).ids[0]
    clock.now += 24 * HOUR
    store.add(new("ann", category="visitors"))
    assert store.get(key).expires_at == datetime(2026, 1, 5, tzinfo=UTC)


def test_other_content_under_a_chosen_id_is_told(store: MemoryStore) -> None:
    """The one that is there stays, and the caller can see that his own is not stored."""
    store.add(note("mine"))
    result = store.add([new("x", memory_id="mine"), note("mine"), note("new"), note("new")])
    assert (result.added, result.already, result.differing) == (1, 3, ("mine",))
    assert store.get("mine").text == "mine"
    twice = store.add([new("one", memory_id="id"), new("two", memory_id="id")])
    assert (twice.added, twice.differing, store.get("id").text) == (1, ("id",), "one")


def test_what_another_deletes_meanwhile_is_stored(tmp_path: Path) -> None:
    """It was there when the vectors were made, and gone when they were written."""
    other = MemoryStore(tmp_path, embedder=Hashing())
    first = other.add(new("a")).ids[0]

    class Deleting(Hashing):
        def embed(self, items: object) -> np.ndarray:  # type: ignore[override]
            other.delete([first])
            return super().embed(items)  # type: ignore[arg-type]

    store = MemoryStore(tmp_path, embedder=Deleting())
    assert store.add([new("a"), new("b")]).added == 2
    assert texts(store) == ["a", "b"]


COMPOSED, DECOMPOSED = "Caf\xe9 in Z\xfcrich", "Cafe\u0301 in Zu\u0308rich"


@pytest.mark.parametrize("first", [COMPOSED, DECOMPOSED])
def test_one_text_in_two_normalisations_is_one_memory(store: MemoryStore, first: str) -> None:
    """What a Mac's file names spell in another way is there already; what was first given stays."""
    texts_given = [first, COMPOSED, DECOMPOSED]
    result = store.add([new(text) for text in texts_given])
    assert (result.added, result.already, len(set(result.ids))) == (1, 2, 1)
    for text in (COMPOSED, DECOMPOSED):
        assert store.add(new(text)).already == 1
        assert store.content_id(Content(text=text)) == result.ids[0]
    assert texts(store) == [first]
    # Chosen ids are compared alike, and pictures beside the text still count.
    store.add(new(first, memory_id="chosen"))
    assert store.add(new(COMPOSED, memory_id="chosen")).differing == ()
    assert store.add(NewMemory(content=Content(text=COMPOSED, vision=png(1)))).added == 1
    # Look-alikes are other texts.
    assert store.add(new("Cafe in Zurich")).added == 1


def test_what_was_stored_under_its_own_spelling_is_found(store: MemoryStore) -> None:
    """A store of before has a decomposed text under the hash of its own bytes."""
    old = incoming.content_id(Content(text=DECOMPOSED), "c", store.database.id_key().value)
    store.add(new(DECOMPOSED, category="c", memory_id=old))
    for text in (COMPOSED, DECOMPOSED):
        result = store.add(new(text, category="c"))
        assert (result.already, result.ids) == (1, (old,))
    assert texts(store) == [DECOMPOSED]
    # Where an update took it, the text is added once.
    store.update(old, text="gone")
    assert store.add(new(COMPOSED, category="c")).added == 1
    assert store.add(new(DECOMPOSED, category="c")).already == 1


def test_marks_without_end_are_no_trap(store: MemoryStore) -> None:
    """Ordering combining marks is quadratic in the run: 400,000 of them would take an hour."""
    text = "e" + "\u0301\u0316" * 200_000
    key = store.add(new(text)).ids[0]
    assert store.add(new(text)).already == 1
    assert store.get(key).text == text
