"""Bad input: one clear line, and nothing is stored."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import InputError
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, Filter, NewMemory


def _png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(buffer, "png")
    return buffer.getvalue()


def _wav() -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(800, np.float32), 8000, format="WAV")
    return buffer.getvalue()


ONES = np.ones(4, np.float32)


def _memory(**content: object) -> NewMemory:
    return NewMemory(content=Content(**content), embedding=ONES)  # type: ignore[arg-type]


def _with(**fields: object) -> NewMemory:
    return NewMemory(**{"content": Content(text="a"), "embedding": ONES, **fields})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MemoryStore:
    store = MemoryStore(tmp_path_factory.mktemp("bad") / "s", dim=4)
    store.add(_with(memory_id="good"))
    return store


@pytest.mark.parametrize(
    ("memory", "problem"),
    [
        (_memory(), "memory 1 is empty"),
        (_memory(text=" \n"), "text is empty"),
        (_memory(text="x" * 50_000_000), "text has 47.7 MiB, the limit is 8.0 MiB"),
        (_memory(text="\ud800"), "not valid Unicode"),
        (_memory(text=b"bytes"), "text is bytes, not a string"),
        (_memory(vision=b"no image"), "vision is no image that can be decoded"),
        (_memory(vision=b""), "vision is no image that can be decoded"),
        (_memory(vision=_png()[:-60]), "vision is no image that can be decoded"),
        (_memory(vision="a.png"), "vision is str, not bytes"),
        (_memory(vision=bytes(65 << 20)), "vision has 65.0 MiB, the limit is 64.0 MiB"),
        (_memory(audio=b"RIFFno sound"), "audio is no sound that can be decoded"),
        (_memory(audio=_wav()[:-99]), "audio is cut short"),
        (_memory(audio=_wav()[:44]), "audio holds no sample|cut short|no sound"),
        (_with(embedding=np.ones(5)), r"embedding has shape \(5,\), this store has \(4,\)"),
        (_with(embedding=np.ones((1, 4))), r"embedding has shape \(1, 4\)"),
        (_with(embedding=np.array([1, np.nan, 0, 0])), "embedding holds NaN or infinity"),
        (_with(embedding=np.array([1, np.inf, 0, 0])), "embedding holds NaN or infinity"),
        (_with(embedding=np.zeros(4)), "embedding is all zeros"),
        (_with(embedding=np.array(["a", "b", "c", "d"])), "embedding has dtype"),
        (_with(embedding=None), "no embedding was given"),
        (_with(memory_id=""), "memory_id is empty"),
        (_with(memory_id="x" * 600), "memory_id is longer than 512 bytes"),
        (_with(category=None), "category is NoneType, not a string"),
        (_with(timestamp="today"), "timestamp is str, not a datetime"),
        ("a text", "memory 1 is str, not a NewMemory"),
    ],
)
def test_a_bad_memory_is_refused_before_storing(
    store: MemoryStore, memory: NewMemory, problem: str
) -> None:
    """The message names the memory and the fault, and the good one beside it is not stored."""
    with pytest.raises(InputError, match=problem) as caught:
        store.add([_with(memory_id="beside"), memory])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert store.vectors()[0] == ["good"]


def test_half_precision_does_not_overflow(store: MemoryStore) -> None:
    """Large float16 values are a fine direction."""
    store.add(_with(memory_id="half", embedding=np.full(4, 60_000, np.float16)))
    np.testing.assert_allclose(store.vectors(["half"])[1], np.full((1, 4), 0.5))
    store.delete(["half"])


@pytest.mark.parametrize(
    ("query", "options", "problem"),
    [
        (None, {}, "the query is empty"),
        (None, {"text": "  "}, "the query is empty"),
        (ONES, {"top_k": -3}, "top_k is -3"),
        (ONES, {"top_k": 0}, "top_k is 0"),
        (ONES, {"top_k": True}, "top_k is True"),
        (ONES, {"top_k": 2.5}, "top_k is 2.5"),
        (ONES, {"top_k": 10**9}, "top_k is 1000000000"),
        (np.ones(7), {}, "query vector has 7 dimensions, this store has 4"),
        (np.ones((2, 4)), {}, r"query vector has shape \(2, 4\)"),
        (ONES * np.nan, {}, "query vector holds NaN"),
        (np.zeros(4), {}, "query vector is all zeros"),
        ([[1], [1, 2]], {}, "the query vector is no vector"),
        (ONES, {"model_id": "other"}, "not of 'other'"),
        (None, {"text": "x " * 25_000_000}, "query has 47.7 MiB, the limit is 8.0 MiB"),
        (None, {"text": 5}, "query is int, not a string"),
        (None, {"text": "\ud800"}, "query is not valid Unicode"),
        (ONES, {"where": Filter(categories="abc")}, "categories is one str, not several"),  # type: ignore[arg-type]
        (ONES, {"where": Filter(ids=("\ud800",))}, "ids holds text that is not valid Unicode"),
        (ONES, {"where": Filter(since="today")}, "since is str, not a datetime"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_query_is_refused(
    store: MemoryStore, query: object, options: dict[str, object], problem: str
) -> None:
    """Nothing is searched with a query that means nothing."""
    with pytest.raises(InputError, match=problem):
        store.search(query, **options)  # type: ignore[arg-type]


def test_one_id_where_several_belong_is_refused(store: MemoryStore) -> None:
    """A string is a sequence of letters, and must not be taken for ids."""
    for attempt in (store.delete, store.get_many, store.touch, store.rows, store.links):
        with pytest.raises(InputError, match="ids is one str, not several"):
            attempt("good")
    for bad, problem in (("\ud800", "not valid Unicode"), (7, "no string")):
        with pytest.raises(InputError, match=problem):
            store.get(bad)  # type: ignore[arg-type]
    assert store.count() == 1


def test_an_unknown_id_is_named(store: MemoryStore) -> None:
    """get, get_many and vectors say which id is not there."""
    for attempt in (
        lambda: store.get("nobody"),
        lambda: store.get_many(["good", "nobody"]),
        lambda: store.vectors(["nobody", "good"]),
    ):
        with pytest.raises(InputError, match="has no memory 'nobody'"):
            attempt()


def test_bad_content_to_find_is_refused(store: MemoryStore, tmp_path: Path) -> None:
    """Empty or damaged content is refused before any model sees it."""
    for content in (Content(), Content(text=""), Content(vision=b"x")):
        with pytest.raises(InputError, match=r"query.* is (empty|no image)"):
            store.find(content)
