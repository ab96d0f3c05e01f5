"""Memory files as the founding documents define them, and what an import refuses."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memopt.errors import InputError
from memopt.memory.lifecycle.retention import retain
from memopt.memory.lifecycle.verify import verify
from memopt.memory.memory_store import MemoryStore
from memopt.memory.privacy.redaction import redactor
from tests.memory.kit import DIM, note, png

DAY = datetime(2026, 3, 1)
MEMORY = pa.schema(
    [
        ("memory_id", pa.string()),
        ("text", pa.string()),
        ("vision_data", pa.binary()),
        ("audio_data", pa.binary()),
        ("joint_embedding", pa.list_(pa.float16())),
        ("association_links", pa.list_(pa.string())),
        ("timestamp", pa.timestamp("us")),
        ("access_count", pa.int32()),
        ("category", pa.string()),
    ]
)
PAIR = pa.struct([("linked_id", pa.string()), ("weight", pa.float32())])
GRAPH = pa.schema([("memory_id", pa.string()), ("links", pa.list_(PAIR))])
SUMMARY = pa.schema(
    [
        ("memory_id", pa.string()),
        ("category", pa.string()),
        ("summary", pa.string()),
        ("source_memory_ids", pa.list_(pa.string())),
        ("consolidated_at", pa.timestamp("us")),
        ("source_count", pa.int32()),
    ]
)


def memory(at: int, **fields: Any) -> dict[str, Any]:
    vector = np.zeros(DIM, np.float16)
    vector[at] = 1
    row = {
        "memory_id": f"m{at}",
        "text": f"note {at}",
        "vision_data": png(at) if at == 1 else None,
        "audio_data": None,
        "joint_embedding": vector,
        "association_links": ["m0"] if at == 3 else [],
        "timestamp": DAY + timedelta(hours=at),
        "access_count": at,
        "category": "general",
    }
    return {**row, **fields}


def summary(**fields: Any) -> dict[str, Any]:
    row = {
        "memory_id": "consolidated_general_20260302_000000",
        "category": "general",
        "summary": "both notes in short",
        "source_memory_ids": ["m0", "m1"],
        "consolidated_at": DAY + timedelta(days=1),
        "source_count": 2,
    }
    return {**row, **fields}


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def founding(folder: Path, *, apart: bool) -> None:
    """Write the files as one each, or as a file per memory the way their code does."""
    rows = [memory(at) for at in range(4)]
    if apart:
        for row in rows:
            write(folder / "memories" / f"{row['memory_id']}.parquet", [row], MEMORY)
        write(folder / "multimodal_index.parquet", rows, MEMORY)
        write(folder / "long_term" / f"{summary()['memory_id']}.parquet", [summary()], SUMMARY)
    else:
        write(folder / "memories.parquet", rows, MEMORY)
        write(folder / "long_term_memory.parquet", [summary()], SUMMARY)
    links = [{"linked_id": "m1", "weight": 0.75}, {"linked_id": "gone", "weight": 0.5}]
    write(folder / "association_graph.parquet", [{"memory_id": "m0", "links": links}], GRAPH)


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    clock = lambda: datetime(2026, 3, 5, tzinfo=UTC)  # noqa: E731
    return MemoryStore(tmp_path / "s", dim=DIM, clock=clock, background=False)


@pytest.mark.parametrize("apart", [False, True])
def test_the_founding_files_come_in_whole(tmp_path: Path, store: MemoryStore, apart: bool) -> None:
    """32-bit counts, links as plain ids, the graph, a summary whose id is no memory."""
    founding(tmp_path / "in", apart=apart)
    done = store.import_parquet(tmp_path / "in")
    assert (done.memories, done.long_term, done.linked, done.dangling) == (5, 1, 3, 1)
    assert [store.get(f"m{at}").access_count for at in range(4)] == [0, 1, 2, 3]
    assert store.get("m1").vision_data == png(1)
    links = {link.linked_id: link.weight for link in store.get("m0").association_links}
    assert links == {"m1": 0.75, "m3": 1.0}
    condensed = store.get(summary()["memory_id"])
    assert (condensed.tier, condensed.summary) == ("long_term", "both notes in short")
    assert condensed.source_memory_ids == ("m0", "m1")
    assert condensed.joint_embedding is not None
    assert np.allclose(condensed.joint_embedding[:2], 0.5**0.5, atol=1e-3)
    assert [store.get(f"m{at}").tier for at in range(4)] == ["archived"] * 2 + ["short_term"] * 2
    assert verify(store).problems == {}
    again = store.import_parquet(tmp_path / "in")
    assert (again.memories, again.already, again.differing, again.linked) == (0, 5, 0, 0)


def test_a_summary_whose_sources_are_gone_is_kept(tmp_path: Path, store: MemoryStore) -> None:
    """Near its category, until the store is reembedded."""
    write(tmp_path / "in" / "memories.parquet", [memory(2)], MEMORY)
    write(tmp_path / "in" / "x.parquet", [summary()], SUMMARY)
    assert store.import_parquet(tmp_path / "in").long_term == 1


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"memory_id": "x" * 600}, "longer than 512"),
        ({"text": "x" * (9 << 20)}, "text has 9.0 MiB"),
        ({"vision_data": b"no picture"}, "no image"),
        ({"access_count": -1}, "count of -1"),
        ({"association_links": [None]}, "without an id"),
        ({"timestamp": None}, "no timestamp"),
    ],
)
def test_a_row_that_add_would_refuse_refuses_all(
    tmp_path: Path, store: MemoryStore, bad: dict[str, Any], named: str
) -> None:
    """The last of many rows: nothing was stored, nothing is left in the folder."""
    rows = [memory(at % DIM, memory_id=f"r{at}") for at in range(600)]
    write(tmp_path / "in" / "memories.parquet", [*rows, memory(3, **bad)], MEMORY)
    with pytest.raises(InputError, match=named):
        store.import_parquet(tmp_path / "in")
    assert store.count() == 0
    assert list((tmp_path / "s").glob(".staging-*")) == []


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_bad_link_or_summary_refuses_all(
    tmp_path: Path, store: MemoryStore, weight: float
) -> None:
    """Before the memories are stored, which come first."""
    write(tmp_path / "in" / "memories.parquet", [memory(0)], MEMORY)
    link = [{"linked_id": "m0", "weight": weight}]
    write(tmp_path / "in" / "g.parquet", [{"memory_id": "m0", "links": link}], GRAPH)
    with pytest.raises(InputError, match="link of weight"):
        store.import_parquet(tmp_path / "in")
    (tmp_path / "in" / "g.parquet").unlink()
    write(tmp_path / "in" / "l.parquet", [summary(summary=None)], SUMMARY)
    with pytest.raises(InputError, match="has no summary"):
        store.import_parquet(tmp_path / "in")
    assert store.count() == 0


@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.list_(pa.string())])
def test_a_column_of_another_type_is_one_line(
    tmp_path: Path, store: MemoryStore, kind: pa.DataType
) -> None:
    """Arrow's own errors never come through."""
    column = pa.array([None if pa.types.is_list(kind) else "7"], pa.string())
    table = pa.Table.from_pylist([memory(0)], MEMORY)
    table = table.set_column(6, "timestamp", column.cast(pa.string()))
    table = table.set_column(4, "joint_embedding", pa.array([None], kind))
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "memories.parquet")
    with pytest.raises(InputError, match=r"memories\.parquet"):
        store.import_parquet(tmp_path / "in")
    pq.write_table(pa.table({"foreign": [1]}), tmp_path / "in" / "other.parquet")
    with pytest.raises(InputError, match="neither memories nor links"):
        store.import_parquet(tmp_path / "in")


def test_ends_travel_and_the_expired_stay_behind(tmp_path: Path) -> None:
    """With tier and last access; the policy of the store that imports counts too."""
    now = [datetime(2026, 3, 1, tzinfo=UTC)]
    ends = now[0] + timedelta(days=9)
    source = MemoryStore(tmp_path / "a", dim=DIM, clock=lambda: now[0], background=False)
    vector = np.eye(DIM)[0]
    source.add(
        [
            note("stays", expires_at=ends, embedding=vector),
            note("went", expires_at=now[0] + timedelta(hours=1), embedding=vector),
            note("visitor", category="visitors", embedding=vector),
        ]
    )
    source.touch(["stays"])
    source.commit(updates=source.cells.pack(source.rows(["visitor"])))
    now[0] += timedelta(hours=2)
    done = source.export_parquet(tmp_path / "out")
    assert (done.memories, done.expired) == (2, 1)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o600}
    target = MemoryStore(tmp_path / "b", dim=DIM, clock=lambda: now[0], background=False)
    retain(target, "visitors", 3)
    assert target.import_parquet(tmp_path / "out").memories == 2
    assert target.get("stays").expires_at == ends
    assert target.get("stays").last_access is not None
    assert target.get("visitor").expires_at == datetime(2026, 3, 5, tzinfo=UTC)
    now[0] += timedelta(days=20)
    late = MemoryStore(tmp_path / "c", dim=DIM, clock=lambda: now[0], background=False)
    assert late.import_parquet(tmp_path / "out").expired == 1


def test_what_comes_in_is_redacted(tmp_path: Path) -> None:
    """Texts and summaries."""
    write(tmp_path / "in" / "m.parquet", [memory(0, text="mail ann@example.org")], MEMORY)
    write(tmp_path / "in" / "l.parquet", [summary(summary="write bob@example.org")], SUMMARY)
    store = MemoryStore(tmp_path / "s", dim=DIM, redact=redactor("patterns"), background=False)
    store.import_parquet(tmp_path / "in")
    assert store.get("m0").text == "mail [EMAIL]"
    assert store.get(summary()["memory_id"]).summary == "write [EMAIL]"
