"""What all jobs here read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.jobs.kit import NONE, ROWS


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of texts of many lengths, none like another, of which two are null."""
    path = tmp_path_factory.mktemp("source") / "rows.parquet"
    texts = [None if i in NONE else f"number {i} " + "word " * (i % 37) for i in range(ROWS)]
    pq.write_table(pa.table({"id": [f"r{i}" for i in range(ROWS)], "text": texts}), path)
    return path
