"""Export and import: the exact schemas, and everything comes back."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memopt.errors import InputError
from memopt.memory.graph.association import AssociationGraph
from memopt.memory.lifecycle.verify import verify
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model import rows
from memopt.memory.model.schema import GRAPH_FILE, LONG_TERM_FILE, MEMORIES_FILE, Content, NewMemory
from tests.memory.kit import DIM, Hashing, note, png, wav

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_the_three_files_have_the_promised_schemas(tmp_path: Path) -> None:
    """Names, types and order; the long-term file holds the summaries."""
    with MemoryStore(tmp_path / "s", embedder=Hashing()) as store:
        AssociationGraph(store)
        store.add([note("a", timestamp=NOW), note("b", timestamp=NOW)])
        columns = {
            "memory_id": ["sum"],
            "timestamp": NOW,
            "tier": "long_term",
            "summary": "a and b",
            "source_memory_ids": [["a", "b"]],
            "source_count": 2,
            "consolidated_at": NOW,
            "model_id": "hashing",
        }
        store.commit(inserts=rows.new_rows(store.embed([Content(text="x")]), columns))
        done = store.export_parquet(tmp_path / "out")
        assert (done.memories, done.long_term) == (3, 1)
    for name, schema in (
        ("memories", MEMORIES_FILE),
        ("associations", GRAPH_FILE),
        ("long_term", LONG_TERM_FILE),
    ):
        found = pq.read_schema(tmp_path / "out" / f"{name}.parquet")
        assert found.remove_metadata().equals(schema)
    with MemoryStore(tmp_path / "t", embedder=Hashing()) as other:
        other.import_parquet(tmp_path / "out")
        summary = other.get("sum")
        assert (summary.tier, summary.summary) == ("long_term", "a and b")
        assert (summary.source_memory_ids, summary.consolidated_at) == (("a", "b"), NOW)


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.text(max_size=20), st.booleans(), st.booleans(), st.integers(0, 10**9)),
        min_size=1,
        max_size=6,
    )
)
def test_everything_comes_back(tmp_path: Path, items: list[tuple[str, bool, bool, int]]) -> None:
    """Content, category, time and links exactly; vectors to the precision of float16."""
    # A folder of its own for each example: hypothesis runs a failing one again.
    base = Path(tempfile.mkdtemp(dir=tmp_path))
    new = []
    for at, (text, seen, heard, seconds) in enumerate(items):
        usable = text.encode("utf-8", "ignore").decode().replace("\0", "")
        usable = usable if usable.strip() else "x"
        content = Content(
            text=usable, vision=png(at) if seen else None, audio=wav(at) if heard else None
        )
        moment = datetime.fromtimestamp(seconds, UTC)
        new.append(
            NewMemory(content=content, category=usable[:3], timestamp=moment, memory_id=f"m{at}")
        )
    with MemoryStore(base / "a", embedder=Hashing()) as store:
        AssociationGraph(store)
        ids = sorted(set(store.add(new).ids))
        store.export_parquet(base / "out")
        before = store.get_many(ids)
    with MemoryStore(base / "b", embedder=Hashing()) as other:
        assert other.import_parquet(base / "out").memories == len(ids)
        assert other.import_parquet(base / "out").memories == 0
        after = other.get_many(ids)
        assert verify(other, ids).problems == {}
    for one, two in zip(before, after, strict=True):
        for name in ("text", "vision_data", "audio_data", "category", "timestamp", "modalities"):
            assert getattr(one, name) == getattr(two, name)
        assert one.association_links == two.association_links
        assert one.joint_embedding is not None
        assert two.joint_embedding is not None
        np.testing.assert_allclose(one.joint_embedding, two.joint_embedding, atol=2e-3)


def test_bad_files_are_named_and_add_nothing(tmp_path: Path) -> None:
    """Missing, damaged, another schema, another dimension, another model."""
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "memories.parquet"
    with MemoryStore(tmp_path / "s", embedder=Hashing()) as store:
        store.add(note("first"))
        with pytest.raises(InputError, match=r"memories\.parquet is missing"):
            store.import_parquet(folder)
        path.write_bytes(b"PAR1 no")
        with pytest.raises(InputError, match="not a readable Parquet file"):
            store.import_parquet(folder)
        pq.write_table(pa.table({"memory_id": ["a"]}), path)
        with pytest.raises(InputError, match="no column 'text'"):
            store.import_parquet(folder)
        for model, dim, named in (("other", DIM, "other"), ("hashing", 3, "3 numbers")):
            with MemoryStore(tmp_path / model, embedder=Hashing(model, dim)) as source:
                source.add(note("x"))
                source.export_parquet(folder)
            with pytest.raises(InputError, match=named):
                store.import_parquet(folder)
        assert store.count() == 1


def damaged(path: Path, **columns: list[object]) -> None:
    """Put other values into the second row of an export's memories."""
    table = pq.read_table(path)
    for name, (value,) in columns.items():
        values = table[name].to_pylist()
        values[1] = value
        column = pa.array(values, table.schema.field(name).type)
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("joint_embedding", [float("nan")] * DIM, "NaN"),
        ("joint_embedding", [0.0] * DIM, "zeros"),
        ("joint_embedding", [1.0] * (DIM - 1), f"{DIM - 1} numbers"),
        ("joint_embedding", None, "0 numbers"),
        ("memory_id", None, "no id"),
        ("memory_id", "a", "twice"),
        ("timestamp", None, "no timestamp"),
    ],
)
def test_one_bad_row_refuses_the_whole_export(
    tmp_path: Path, column: str, value: object, named: str
) -> None:
    """Also when it comes after rows that are good."""
    with MemoryStore(tmp_path / "s", embedder=Hashing()) as store:
        store.add([note("a"), note("b")])
        store.export_parquet(tmp_path / "out")
    damaged(tmp_path / "out" / "memories.parquet", **{column: [value]})
    with (
        MemoryStore(tmp_path / "t", embedder=Hashing()) as other,
        pytest.raises(InputError, match=named),
    ):
        other.import_parquet(tmp_path / "out")
    assert other.count() == 0


def test_links_come_from_the_memories_where_the_graph_file_is_absent(tmp_path: Path) -> None:
    """Both files hold them."""
    with MemoryStore(tmp_path / "s", embedder=Hashing()) as store:
        AssociationGraph(store)
        store.add([note("a"), note("b")])
        store.export_parquet(tmp_path / "out")
    (tmp_path / "out" / "associations.parquet").unlink()
    with MemoryStore(tmp_path / "t", embedder=Hashing()) as other:
        assert other.import_parquet(tmp_path / "out").linked == 2
        assert other.links(["a"]) == store.links(["a"]) != {}
