"""Sources of a job: every kind is cut into fragments that can be read by themselves."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.errors import InputError
from memopt.jobs.reader import FragmentReader, RowCursor
from memopt.jobs.source import JobSource, plan
from tests.memory.s3_server import s3_server

TEXTS = ["a cat", "", "zwei\u2028Hunde", 'said "so", twice', "a cat", "one\ntwo", "end"]


def read(source: JobSource, order: list[int] | None = None) -> tuple[pa.Table, list[str | None]]:
    """Return the kept columns and the inputs of all fragments."""
    reader = FragmentReader(source)
    found = {i: reader.read(source.fragments[i]) for i in order or range(len(source.fragments))}
    parts = [found[i] for i in sorted(found)]
    table = pa.concat_tables([part[0] for part in parts])
    return table, [item.value for part in parts for item in part[1]]


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(write(folder, suffix.removesuffix(".gz")).read_bytes()))
        return path
    rows = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif suffix == ".csv":
        cells = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
        path.write_text("text,n\n" + "\n".join(f"{cell},{n}" for n, cell in enumerate(cells)))
    elif suffix == ".lance":
        lance.write_dataset(pa.Table.from_pylist(rows), path, max_rows_per_file=3)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".csv.gz", ".jsonl.gz", ".lance"])
@pytest.mark.parametrize("size", [2, 100])
def test_every_table_is_read_whole(suffix: str, size: int, tmp_path: Path) -> None:
    """All rows once, in order, whatever the order of the fragments; numbers stay numbers."""
    path = write(tmp_path, suffix)
    source = plan(str(path), "text", rows=size, spool=tmp_path / "spool")
    assert source.rows == len(TEXTS)
    assert [f.first for f in source.fragments] == list(range(0, len(TEXTS), size))
    table, inputs = read(source, list(range(len(source.fragments)))[::-1])
    assert inputs == TEXTS
    numbers = [str(n) if suffix.startswith(".csv") else n for n in range(len(TEXTS))]
    assert table.to_pydict() == {"text": TEXTS, "n": numbers}


def test_a_folder_of_files_is_one_source(tmp_path: Path) -> None:
    """In the order of their names; what begins with an underscore is no data, others are told."""
    write(tmp_path, ".parquet").rename(tmp_path / "b.parquet")
    write(tmp_path, ".parquet").rename(tmp_path / "a.parquet")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "README.md").touch()
    source = plan(f"file://{tmp_path}", "text", keep=["n"], rows=5)
    assert (source.rows, source.ignored, source.keep) == (14, 1, ("n",))
    table, inputs = read(source)
    assert inputs == TEXTS * 2
    assert table.column_names == ["n"]


def test_files_of_other_columns_are_refused(tmp_path: Path) -> None:
    """Unless --keep leaves out what differs."""
    write(tmp_path, ".parquet")
    pq.write_table(pa.table({"text": ["x"], "m": [1]}), tmp_path / "s.parquet")
    with pytest.raises(
        InputError, match=r"kept text \(string\), m \(int64\), and .*kept text \(string\), n"
    ):
        plan(str(tmp_path), "text")
    assert plan(str(tmp_path), "text", keep=["text"]).rows == len(TEXTS) + 1


def test_bad_rows_are_told_from_good_ones(tmp_path: Path) -> None:
    """With the line and the reason; mixed columns are kept as JSON."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x", "m": 1}\nnot json\n{"text": 7, "m": "a"}\n{"m": [1]}\n')
    source = plan(str(path), "text", spool=tmp_path / "spool")
    table, items, where = FragmentReader(source).read(source.fragments[0])
    assert [item.value for item in items] == ["x", None, None, None]
    problems = [item.problem for item in items]
    assert problems[1] is not None
    assert problems[1].startswith("is not JSON")
    assert problems[2:] == ["is int, not text", "is null, not text or bytes"]
    assert where[1] == f"{path} line 2"
    assert table["m"].to_pylist() == ["1", None, '"a"', "[1]"]


def test_names_the_job_writes_itself_are_refused(tmp_path: Path) -> None:
    """A column would be there twice."""
    pq.write_table(pa.table({"text": ["x"], "vector": [1]}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"'vector', which the job writes itself"):
        plan(str(tmp_path / "rows.parquet"), "text")


def test_media_are_a_row_a_file(tmp_path: Path) -> None:
    """The kept column is the path."""
    for name in ("b.wav", "a.wav", "c.txt"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "c.txt").unlink()
    source = plan(str(tmp_path), "audio", rows=1)
    table, inputs = read(source)
    assert table["path"].to_pylist() == [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]
    assert inputs == [tmp_path / "a.wav", tmp_path / "b.wav"]


@pytest.mark.parametrize("name", ["nothing.csv", "nothing.lance", "nothing://x/y"])
def test_what_is_not_there_is_one_line(name: str, tmp_path: Path) -> None:
    """Named as it was given."""
    place = name if "://" in name else str(tmp_path / name)
    with pytest.raises(InputError, match="nothing"):
        plan(place, "text")


def test_a_changed_source_has_another_fingerprint(tmp_path: Path) -> None:
    """So that parts of two sources are never one result."""
    path = write(tmp_path, ".parquet")
    before = plan(str(path), "text").fingerprint
    pq.write_table(pa.table({"text": ["other"]}), path)
    assert plan(str(path), "text").fingerprint != before


def test_object_stores_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet by ranges over HTTP, text files by a copy, from a real socket."""
    with s3_server() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.environment["AWS_ENDPOINT"])
        for suffix in (".parquet", ".csv", ".csv.gz", ".jsonl.gz"):
            bucket.objects[f"data/rows{suffix}"] = write(tmp_path, suffix).read_bytes()
            source = plan(f"s3://data/rows{suffix}", "text", rows=3, spool=tmp_path / "spool")
            assert read(source)[1] == TEXTS


GROUPS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(max_examples=60)
@given(GROUPS, st.lists(st.tuples(st.integers(0, 44), st.integers(1, 20)), max_size=6))
def test_any_run_of_rows_is_read(groups: list[int], runs: list[tuple[int, int]]) -> None:
    """Forwards and back, within a row group and across, to the end and past it."""
    rows = sum(groups)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, pa.schema([("n", pa.int64())])) as writer:
        start = 0
        for group in groups:
            writer.write_table(pa.table({"n": np.arange(start, start + group)}))
            start += group
    cursor = RowCursor(pq.ParquetFile(pa.BufferReader(sink.getvalue())), ["n"])
    for start, count in runs:
        expected = list(range(rows))[start : start + count]
        assert cursor.read(start, count)["n"].to_pylist() == expected
