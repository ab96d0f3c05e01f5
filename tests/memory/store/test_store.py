"""The store: what goes in comes out, once, whole, and under its filters."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from memopt.errors import ConsolidationError, InputError
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model import rows
from memopt.memory.model.schema import Content, Filter, NewMemory, memories_schema
from memopt.memory.store import writer as writing
from memopt.memory.store.observers import StoreObserver

DIM = 8
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


class Letters:
    """An embedder that counts letters: real vectors, no model."""

    model_id = "letters"
    dim = 26

    def __init__(self) -> None:
        self.seen = 0

    def embed(self, items: Sequence[Content]) -> NDArray[np.float32]:
        self.seen += len(items)
        counts = [
            [(item.text or "z").lower().count(chr(97 + n)) for n in range(26)] for item in items
        ]
        array = np.array(counts, np.float32) + 1e-3
        return array / np.linalg.norm(array, axis=1, keepdims=True)


def vector(*values: float) -> NDArray[np.float32]:
    return np.array([*values, *[0.0] * (DIM - len(values))], np.float32)


def new(text: str, *values: float, **fields: object) -> NewMemory:
    return NewMemory(content=Content(text=text), embedding=vector(*values), **fields)  # type: ignore[arg-type]


def png(shade: int = 0) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (4, 4), shade).save(buffer, "png")
    return buffer.getvalue()


def wav(level: float = 0.5) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(160, level, np.float32), 16_000, format="WAV")
    return buffer.getvalue()


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(tmp_path / "store", dim=DIM, clock=lambda: NOW)


def test_a_memory_comes_back_with_all_it_had(store: MemoryStore) -> None:
    """Text in any script, image and sound bytes, times and category survive the round trip."""
    memory = NewMemory(
        content=Content(text="Tür 🚪 門 \0 'quoted'", vision=png(), audio=wav()),
        category="it's",
        timestamp=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=5))),
        expires_at=NOW + timedelta(days=1),
        embedding=vector(3, 4),
    )
    (memory_id,) = store.add(memory).ids
    back = store.get(memory_id)
    assert back.text == memory.content.text
    assert back.vision_data == memory.content.vision
    assert back.audio_data == memory.content.audio
    assert (back.timestamp, back.expires_at) == (memory.timestamp, memory.expires_at)
    assert (back.category, back.tier, back.modalities) == (
        "it's",
        "short_term",
        ("text", "vision", "audio"),
    )
    assert back.joint_embedding is not None
    np.testing.assert_allclose(back.joint_embedding, vector(0.6, 0.8))


def test_the_same_content_is_stored_once(store: MemoryStore) -> None:
    """A repeat in one batch or in a later one is counted as already there; a category differs."""
    first = store.add([new("a", 1), new("b", 2), new("a", 3)])
    assert (first.added, first.already, first.ids[0] == first.ids[2]) == (2, 1, True)
    again = store.add([new("b", 1), new("a", 1, category="other")])
    assert (again.added, again.already, store.count()) == (1, 1, 3)


def test_known_content_is_not_embedded_again(tmp_path: Path) -> None:
    """Adding what is there costs no run of the model."""
    embedder = Letters()
    store = MemoryStore(tmp_path, embedder=embedder)
    store.add([NewMemory(content=Content(text=text)) for text in ("door", "tree", "door")])
    store.add([NewMemory(content=Content(text=text)) for text in ("tree", "lake")])
    assert (embedder.seen, store.count(), store.meta.model_id) == (3, 3, "letters")
    assert store.find(Content(text="lake"), top_k=1)[0].memory.text == "lake"


def test_a_chosen_id_is_kept(store: MemoryStore) -> None:
    """A caller's own id names the memory, and the second one of that name changes nothing."""
    store.add(new("a", 1, memory_id="x'y\\"))
    assert store.add(new("b", 1, memory_id="x'y\\")).already == 1
    assert store.get("x'y\\").text == "a"
    assert store.count(Filter(ids=("x'y\\",))) == 1


def test_mixed_given_and_computed_vectors_keep_their_rows(tmp_path: Path) -> None:
    """Rows with and without an embedding in one batch do not change places."""
    store = MemoryStore(tmp_path, embedder=Letters())
    given = np.eye(26, dtype=np.float32)[25]
    result = store.add(
        [
            NewMemory(content=Content(text="aaa")),
            NewMemory(content=Content(text="given"), embedding=given),
            NewMemory(content=Content(text="bbb")),
        ]
    )
    _, vectors = store.vectors(result.ids)
    assert vectors.argmax(axis=1).tolist() == [0, 25, 1]


def test_a_long_stream_is_cut_into_commits(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk is durable by itself: a bad row later leaves the chunks before it."""
    monkeypatch.setattr(writing, "ROWS_PER_COMMIT", 4)
    stream = (new(f"text {n}", 1, n) if n != 9 else new("", 1) for n in range(12))
    with pytest.raises(InputError, match="memory 9: text is empty"):
        store.add(stream)
    assert store.count() == 8
    result = store.add(new(f"text {n}", 1, n) for n in range(12))
    assert (result.added, result.already, len(result.ids)) == (4, 8, 12)


def test_a_list_is_checked_whole_before_anything_is_stored(store: MemoryStore) -> None:
    """One NaN at the end of a list refuses all of it."""
    memories = [new(f"text {n}", 1, n) for n in range(5)]
    with pytest.raises(InputError, match="memory 5: embedding holds NaN"):
        store.add([*memories, new("bad", float("nan"))])
    assert store.count() == 0


def test_arrow_batches_are_stored(store: MemoryStore) -> None:
    """Half-precision lists, naive timestamps and media columns of a stream are understood."""
    table = pa.table(
        {
            "memory_id": ["a", "b"],
            "text": pa.array(["x", None], pa.large_string()),
            "vision_data": pa.array([None, png()], pa.binary()),
            "joint_embedding": pa.array(
                [vector(1).astype(np.float16), vector(0, 2).astype(np.float16)],
                pa.list_(pa.float16()),
            ),
            "timestamp": pa.array([datetime(2026, 1, 1), datetime(2026, 1, 2)], pa.timestamp("ns")),
        }
    )
    assert store.add_arrow(table).ids == ("a", "b")
    assert store.add_arrow(iter(table.to_batches())).already == 2
    assert store.get("a").timestamp == datetime(2026, 1, 1, tzinfo=UTC)
    assert store.get("b").modalities == ("vision",)
    assert store.search(vector(0, 1))[0].memory.memory_id == "b"


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"text": ["a"], "color": ["red"]}, "unknown column 'color'"),
        ({"text": ["a"], "joint_embedding": [[1.0, 2.0]]}, "has 2 dimensions, this store has 8"),
        ({"text": ["a"], "joint_embedding": ["x"]}, "not a list of floats"),
        ({"text": ["a"], "timestamp": ["yesterday"]}, "column 'timestamp'"),
    ],
)
def test_arrow_columns_that_do_not_fit_are_named(
    store: MemoryStore, columns: dict[str, list[object]], problem: str
) -> None:
    """An unknown column, a wrong dimension or type is one clear error, nothing is stored."""
    with pytest.raises(InputError, match=problem):
        store.add_arrow(pa.table(columns))
    assert store.count() == 0


def test_filters_select_and_bind_their_values(store: MemoryStore) -> None:
    """Time bounds are inclusive and exclusive, quotes in a value are only characters."""
    for day in range(1, 6):
        store.add(
            new(
                f"day {day}",
                1,
                day,
                memory_id=str(day),
                category="a' OR '1'='1" if day == 5 else "b",
                timestamp=datetime(2026, 1, day, tzinfo=UTC),
            )
        )
    store.add(
        NewMemory(
            content=Content(vision=png()), embedding=vector(1, 9), timestamp=NOW, memory_id="i"
        )
    )

    def ids(where: Filter) -> list[str]:
        found = store.scan(where, ["memory_id"])
        return sorted(value for batch in found for value in batch["memory_id"].to_pylist())

    start, end = datetime(2026, 1, 2, tzinfo=UTC), datetime(2026, 1, 4, tzinfo=UTC)
    assert ids(Filter(since=start, until=end)) == ["2", "3"]
    assert ids(Filter(since=start.astimezone(timezone(timedelta(hours=-7))), until=end)) == [
        "2",
        "3",
    ]
    assert ids(Filter(categories=("a' OR '1'='1",))) == ["5"]
    assert ids(Filter(categories=("'; DROP TABLE memories; --",))) == []
    assert ids(Filter(modality="vision")) == ["i"]
    assert ids(Filter(ids=("1", "4"), until=end)) == ["1"]
    assert ids(Filter(tiers=("long_term", "archived"))) == []
    hits = store.search(vector(1), where=Filter(categories=("b",), since=start), top_k=10)
    assert [hit.memory.memory_id for hit in hits] == ["2", "3", "4"]


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        (Filter(tiers=("warm",)), "unknown tier 'warm'"),
        (Filter(modality="smell"), "unknown modality 'smell'"),
        (Filter(since=NOW, until=NOW), "is not before until"),
    ],
)
def test_a_filter_that_cannot_match_is_refused(
    store: MemoryStore, where: Filter, problem: str
) -> None:
    """A typing error in a filter is an error, not an empty answer."""
    with pytest.raises(InputError, match=problem):
        store.search(vector(1), where=where)


def test_search_ranks_by_cosine(store: MemoryStore) -> None:
    """Scores are cosine similarities, opposite vectors count as 0, the length does not matter."""
    store.add([new("same", 5), new("near", 1, 1), new("against", -1)])
    hits = store.search(vector(2))
    assert [hit.memory.text for hit in hits] == ["same", "near", "against"]
    np.testing.assert_allclose([hit.score for hit in hits], [1, 2**-0.5, 0], atol=1e-6)


def test_words_and_both_find(store: MemoryStore) -> None:
    """Words find what has them in any script; fusion puts first what both lists have."""
    store.add([new("a red door", 1), new("a blue door", 0, 1), new("das Haus am See", 0, 0, 1)])
    store.add(new("東京の天気", 0, 0, 0, 1))
    assert store.search(text="HAUS")[0].memory.text == "das Haus am See"
    assert store.search(text="天気")[0].memory.text == "東京の天気"
    assert {hit.memory.text for hit in store.search(text="door")} == {"a red door", "a blue door"}
    assert store.search(text='door AND (" OR') != []
    assert store.search(text="nowhere") == []
    store.commit(summary_row("sum", "ab"))
    assert [hit.score for hit in store.search(text="short")] == [1.0]
    both = store.search(vector(0, 1, 0.5), text="red door", top_k=2)
    assert both[0].memory.text in ("a red door", "a blue door")
    assert both[0].score > both[1].score > 0


def test_hits_are_whole_whatever_they_hold(store: MemoryStore) -> None:
    """Media, summaries and archived content are read with a hit as soon as one has them."""
    store.add(new("a", 1, memory_id="a"))
    assert store.search(vector(1))[0].memory.text == "a"
    store.add(NewMemory(content=Content(vision=png(7)), embedding=vector(0, 1), memory_id="v"))
    store.add(NewMemory(content=Content(audio=wav()), embedding=vector(0, 0, 1), memory_id="s"))
    store.commit(
        summary_row("sum", ["a"]), with_tier(store.cells.pack(store.rows(["v"])), "archived")
    )
    hits = {hit.memory.memory_id: hit.memory for hit in store.search(vector(1, 1, 1))}
    assert (hits["v"].vision_data, hits["s"].audio_data) == (png(7), wav())
    assert (hits["sum"].summary, hits["sum"].source_memory_ids) == ("in short", ("a",))
    fresh = MemoryStore(store.place.uri).search(vector(0, 1), text="short")
    assert {hit.memory.memory_id for hit in fresh} == set(hits)


def test_candidates_are_ids_and_scores(store: MemoryStore) -> None:
    """The light search agrees with the whole one and counts no access."""
    store.add([new("same", 5), new("near", 1, 1), new("other", 0, 0, 1, category="c")])
    light = store.candidates(vector(2), top_k=2)
    assert light == [(hit.memory.memory_id, hit.score) for hit in store.search(vector(2), top_k=2)]
    assert len(store.candidates(vector(2), where=Filter(categories=("c",)))) == 1
    assert store.get(light[0][0]).access_count == 1


def test_expired_memories_are_not_found(tmp_path: Path) -> None:
    """From its expiry on a memory is gone for readers, and enough others are still returned."""
    now = [NOW]
    store = MemoryStore(tmp_path, dim=DIM, clock=lambda: now[0])
    store.add([new(f"old {n}", 1, n / 100, expires_at=NOW + timedelta(hours=1)) for n in range(9)])
    store.add([new(f"lasting {n}", 1, 5 + n, memory_id=str(n)) for n in range(3)])
    assert store.search(vector(1), top_k=1)[0].memory.text == "old 0"
    old = store.search(vector(1), top_k=1)[0].memory.memory_id
    now[0] += timedelta(hours=1)
    assert [hit.memory.memory_id for hit in store.search(vector(1), top_k=2)] == ["0", "1"]
    with pytest.raises(InputError, match="has no memory"):
        store.get(old)


def test_accesses_are_counted(store: MemoryStore) -> None:
    """Search counts, get does not; the count is seen at once and is written by flush."""
    (memory_id,) = store.add(new("a", 1)).ids
    for _ in range(3):
        store.search(vector(1))
    store.search(vector(1), touch=False)
    assert store.get(memory_id).access_count == 3
    store.close()
    other = MemoryStore(store.place.uri)
    again = other.get(memory_id)
    assert (again.access_count, again.last_access, again.text) == (3, NOW, "a")
    other.touch([memory_id])
    store.touch([memory_id, "gone"])
    other.close()
    store.close()
    assert MemoryStore(store.place.uri).get(memory_id).access_count == 5


def test_counting_accesses_never_rewrites_media(store: MemoryStore) -> None:
    """Flush after flush writes kilobytes beside a picture of a megabyte, and all indices stay."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((1024, 1024), 99).save(buffer, "png")
    picture = NewMemory(content=Content(text="x", vision=buffer.getvalue()), embedding=vector(1))
    ids = [*store.add(picture).ids, *store.add(new("small", 0, 1)).ids]
    folder = (store.place.local or Path()) / "memories.lance" / "data"
    before = {path.name for path in folder.iterdir()}
    for _ in range(3):
        store.touch(ids)
        store.flush()
    written = [path.stat().st_size for path in folder.iterdir() if path.name not in before]
    assert written
    assert max(written) < 50_000
    assert store.database.memories.index_stats("memory_id_idx").num_unindexed_rows == 0
    assert [memory.access_count for memory in store.get_many(ids)] == [3, 3]


def test_many_touches_are_written_in_the_background(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past a bound the counts reach the table without anyone asking."""
    from memopt.memory.store import access_counts as touches

    monkeypatch.setattr(touches, "MOST_PENDING", 3)
    ids = store.add([new(f"text {n}", 1, n) for n in range(4)]).ids
    store.touch(ids)
    store.flush()
    assert store.counts.pending() == {}
    assert [memory.access_count for memory in store.get_many(ids)] == [1] * 4


def test_update_changes_fields_and_keeps_the_rest(store: MemoryStore) -> None:
    """New text needs a new vector; other fields change alone, the access count stays."""
    (memory_id,) = store.add(
        NewMemory(content=Content(text="a", vision=png()), embedding=vector(1), category="x")
    ).ids
    store.search(vector(1))
    store.update(memory_id, category="y", expires_at=NOW + timedelta(days=1))
    with pytest.raises(InputError, match="no embedder"):
        store.update(memory_id, text="b")
    assert store.get(memory_id).text == "a"
    store.update(memory_id, text="b", joint_embedding=vector(0, 1))
    back = store.get(memory_id)
    assert (back.text, back.category, back.access_count) == ("b", "y", 1)
    assert back.vision_data == png()
    assert store.search(vector(0, 1))[0].score == pytest.approx(1)
    assert store.search(text="b")[0].memory.memory_id == memory_id
    store.update(memory_id, text=None, joint_embedding=vector(0, 1))
    assert store.get(memory_id).modalities == ("vision",)
    for fields, problem in (
        ({"color": 1}, "'color' cannot be updated"),
        ({}, "nothing to update"),
        ({"vision_data": b"no image", "joint_embedding": vector(1)}, "no image"),
        ({"vision_data": None, "joint_embedding": vector(1)}, "is empty"),
        ({"tier": "archived"}, "'tier' cannot be updated"),
        ({"summary": "short"}, "it has no summary"),
        ({"summary": 5}, "summary is int, not a string"),
        ({"category": 5}, "category is int, not a string"),
        ({"category": "x" * 600}, "category is longer than 512 bytes"),
        ({"timestamp": "2026-01-01"}, "'2026-01-01' is str, not a datetime"),
        (
            {"expires_at": datetime.max.replace(tzinfo=timezone(-timedelta(hours=1)))},
            "outside the years 1 to 9999",
        ),
    ):
        with pytest.raises(InputError, match=problem):
            store.update(memory_id, **fields)
    with pytest.raises(InputError, match="has no memory 'nobody'"):
        store.update("nobody", category="z")


def test_a_text_that_is_too_large_is_refused_before_it_is_redacted(tmp_path: Path) -> None:
    """Redaction takes the better part of a second for a MiB: nobody waits for it to be refused."""
    redacted: list[str] = []

    def redact(text: str) -> str:
        redacted.append(text[:9])
        return text

    with MemoryStore(tmp_path / "s", dim=DIM, redact=redact) as store:
        (key,) = store.add(new("small", 1)).ids
        large = "x" * (9 << 20)
        for change in (
            lambda: store.add([new("fine", 2), new(large, 3)]),
            lambda: store.update(key, text=large, joint_embedding=vector(1)),
            lambda: store.update(key, summary=large),
        ):
            with pytest.raises(InputError, match=r"has 9\.0 MiB, the limit is 8\.0 MiB"):
                change()
        assert [memory.text for memory in store.get_many([key])] == ["small"]
    assert redacted == ["small", "fine"]


def test_delete_counts_what_was_there(store: MemoryStore) -> None:
    """Unknown and repeated ids are passed over; listeners hear of it before it happens."""
    ids = store.add([new("a", 1), new("b", 2)]).ids
    heard: list[str] = []

    class Listener(StoreObserver):
        def deleting(self, ids: Sequence[str]) -> None:
            heard.extend(memory_id for memory_id in ids if store.count(Filter(ids=(memory_id,))))

    store.observers.add(Listener())
    assert store.delete([ids[0], ids[0], "nobody"]) == 1
    assert (heard, store.count(), store.delete([])) == ([ids[0]], 1, 0)


def summary_row(memory_id: str, sources: Sequence[str]) -> pa.Table:
    columns = {
        "memory_id": [memory_id],
        "timestamp": NOW,
        "tier": "long_term",
        "summary": "in short",
        "source_memory_ids": [list(sources)],
        "source_count": len(sources),
    }
    return rows.new_rows(vector(1)[None], columns)


def with_tier(table: pa.Table, tier: str) -> pa.Table:
    at = table.column_names.index("tier")
    return table.set_column(at, table.schema.field(at), pa.array([tier] * table.num_rows))


def test_one_commit_inserts_updates_and_deletes(store: MemoryStore) -> None:
    """A lifecycle step is one version of the table, whatever it does."""
    ids = store.add([new(f"text {n}", 1, n, memory_id=str(n)) for n in range(5)]).ids
    packed = with_tier(store.cells.pack(store.rows(["0"])), "archived")
    store.touch(["0"])
    store.flush()
    store.commit(summary_row("s", ids[1:3]), packed, ids[1:3])
    assert sorted(store.vectors()[0]) == ["0", "3", "4", "s"]
    archived = store.get("0")
    assert (archived.tier, archived.text, archived.access_count) == ("archived", "text 0", 1)
    assert store.rows(["0"])["text"].to_pylist() == ["text 0"]  # where its words are found
    assert store.get("s").source_memory_ids == ("1", "2")
    assert store.search(text="short")[0].memory.memory_id == "s"


def test_a_commit_is_whole_when_it_is_cut_short(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its one merge, a commit shows the summary and none of the dropped originals."""
    store.add([new(f"text {n}", 1, n, memory_id=str(n)) for n in range(4)])
    version = store.database.memories.version
    sweep = writing.Writer.sweep
    calls: list[int] = []

    def killed(writer: writing.Writer) -> int:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sweep(writer)

    monkeypatch.setattr(writing.Writer, "sweep", killed)
    with pytest.raises(KeyboardInterrupt):
        store.commit(summary_row("s", "01"), None, ["0", "1"])
    monkeypatch.undo()
    assert store.database.memories.version == version + 1
    fresh = MemoryStore(store.place.uri)
    assert sorted(fresh.vectors()[0]) == ["2", "3", "s"]
    assert (fresh.count(), fresh.stats().memories) == (3, 3)
    assert {hit.memory.memory_id for hit in fresh.search(vector(1), top_k=9)} == {"2", "3", "s"}
    with pytest.raises(InputError, match="has no memory '0'"):
        fresh.get("0")
    assert fresh.add(new("text 0", 1, memory_id="0")).added == 1
    assert fresh.get("0").text == "text 0"
    fresh.commit(deletes=["3"])
    assert (fresh.database.memories.count_rows(), sorted(fresh.vectors()[0])) == (
        3,
        ["0", "2", "s"],
    )


def test_a_commit_on_stale_knowledge_changes_nothing(store: MemoryStore) -> None:
    """A forgotten memory is neither brought back by an update nor summarised."""
    store.add([new(f"text {n}", 1, n, memory_id=str(n)) for n in range(3)])
    stale = store.rows(["0"])
    store.delete(["0"])
    with pytest.raises(ConsolidationError, match="are gone, first 0"):
        store.commit(updates=stale)
    with pytest.raises(ConsolidationError, match="are gone, first 0"):
        store.commit(summary_row("s", "01"), None, ["0", "1"])
    with pytest.raises(ConsolidationError, match="exist already, first 1"):
        store.commit(summary_row("1", "2"), None, ["2"])
    with pytest.raises(InputError, match="names a memory twice"):
        store.commit(None, store.rows(["1"]), ["1"])
    assert sorted(store.vectors()[0]) == ["1", "2"]


def test_listeners_hear_only_of_new_rows(store: MemoryStore) -> None:
    """A repeat is not announced; vectors come normalised, with the times."""
    heard: list[tuple[list[str], NDArray[np.float32], list[datetime]]] = []

    class Listener(StoreObserver):
        def added(
            self, ids: Sequence[str], vectors: NDArray[np.float32], times: Sequence[datetime]
        ) -> None:
            heard.append((list(ids), vectors, list(times)))

    store.observers.add(Listener())
    store.add(new("a", 2, memory_id="a"))
    store.add([new("a", 2, memory_id="a"), new("b", 0, 2, memory_id="b")])
    assert [ids for ids, _, _ in heard] == [["a"], ["b"]]
    np.testing.assert_array_equal(heard[1][1], vector(0, 1)[None])
    assert heard[1][2] == [NOW]


def test_observers_see_reads_writes_and_deletes(store: MemoryStore) -> None:
    """What an access log needs passes by, with the ids."""
    seen: list[tuple[str, list[str]]] = []

    class Observer(StoreObserver):
        def accessed(self, action: str, ids: Sequence[str]) -> None:
            seen.append((action, list(ids)))

    store.observers.add(Observer())
    store.add(new("a", 1, memory_id="a"))
    store.add(new("a", 1, memory_id="a"))
    store.get("a")
    store.search(vector(1))
    store.update("a", category="x")
    store.delete(["a", "b"])
    assert seen == [
        ("write", ["a"]),
        ("read", ["a"]),
        ("read", ["a"]),
        ("write", ["a"]),
        ("delete", ["a"]),
    ]


def test_events_are_kept_in_order(store: MemoryStore) -> None:
    """What failed is found again, with its memories and the time of the next try."""
    store.event("llm", "timed out", ["a"], retry_at=NOW + timedelta(hours=1))
    store.event("fallback", "extractive")
    (event,) = store.events("llm")
    assert (event.detail, event.memory_ids, event.retry_at, event.at) == (
        "timed out",
        ("a",),
        NOW + timedelta(hours=1),
        NOW,
    )
    assert len(store.events()) == 2


def test_stats_count_what_is_there(store: MemoryStore) -> None:
    """Tiers, modalities, categories, accesses, times and bytes, also of an empty store."""
    assert store.stats().oldest is None
    store.add([new("a", 1, category="x"), new("b", 2, category="x", timestamp=NOW - timedelta(1))])
    store.add(NewMemory(content=Content(vision=png()), embedding=vector(3)))
    store.commit(summary_row("s", "ab"))
    store.search(vector(1), top_k=2)
    stats = store.stats()
    assert stats.tiers == {"short_term": 3, "long_term": 1, "archived": 0}
    assert stats.modalities == {"text": 2, "vision": 1, "audio": 0}
    assert (stats.categories["x"], stats.accesses, stats.memories) == (2, 2, 4)
    assert (stats.oldest, stats.newest) == (NOW - timedelta(1), NOW)
    assert stats.bytes_on_disk is not None
    assert stats.bytes_on_disk > stats.table_bytes["memories"] > 0


def test_redaction_comes_before_everything(tmp_path: Path) -> None:
    """The stored text, its hash and what the embedder sees are redacted."""
    store = MemoryStore(tmp_path, embedder=Letters(), redact=lambda text: text.replace("zzz", "*"))
    (memory_id,) = store.add(NewMemory(content=Content(text="call zzz"))).ids
    assert store.get(memory_id).text == "call *"
    assert memory_id == store.content_id(Content(text="call *"))
    embedding = store.get(memory_id).joint_embedding
    assert embedding is not None
    assert embedding[25] < 0.01
    store.update(memory_id, text="write zzz")
    assert store.get(memory_id).text == "write *"


def test_unordered_and_repeated_ids_keep_their_order(store: MemoryStore) -> None:
    """get_many and vectors answer in the order asked."""
    store.add([new(f"text {n}", 1, n, memory_id=str(n)) for n in range(6)])
    assert [m.memory_id for m in store.get_many(["4", "0", "4"])] == ["4", "0", "4"]
    ids, vectors = store.vectors(["5", "1"])
    assert ids == ["5", "1"]
    assert vectors[0, 1] > vectors[1, 1]
    assert store.rows([]).schema == memories_schema(DIM)


def test_rows_are_found_after_compaction(store: MemoryStore) -> None:
    """Looking up by id, word and vector works the same once the indices cover the rows."""
    ids = [store.add(new(f"word{n} text", 1, n)).ids[0] for n in range(5)]
    store.optimize()
    for index in store.database.memories.list_indices():
        assert store.database.memories.index_stats(index.name).num_unindexed_rows == 0
    assert store.get(ids[3]).text == "word3 text"
    assert store.search(text="word4")[0].memory.memory_id == ids[4]
    assert store.search(vector(1, 2), top_k=1)[0].memory.memory_id == ids[2]
    assert store.add(new("word1 text", 1)).already == 1
