"""Properties of encode(): batching, order and padding never change a vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.bundle import Bundle
from memopt.runtimes.batching import Budget, bucket, by_budget
from memopt.runtimes.engine import ArrowEngine

TEXTS = st.lists(st.text(max_size=60) | st.text("abc \n", max_size=400), max_size=12)


@pytest.fixture(scope="module")
def engine(minilm: Bundle) -> Any:
    with ArrowEngine(minilm, device="cpu") as opened:
        yield opened


@settings(max_examples=25, deadline=None)
@given(texts=TEXTS, size=st.none() | st.integers(1, 8))
def test_encode_equals_one_by_one(engine: ArrowEngine, texts: list[str], size: int | None) -> None:
    """Whatever the texts and the batch size, each vector is that of its text alone, to 1e-5."""
    vectors = engine.encode(texts, batch_size=size)
    assert vectors.shape == (len(texts), 384)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(vector, engine.encode([text])[0], atol=1e-5)


LENGTHS = st.lists(st.integers(0, 5000), min_size=1, max_size=200)


@given(lengths=LENGTHS, size=st.none() | st.integers(1, 64))
def test_batches_hold_every_row_once_and_fit(lengths: list[int], size: int | None) -> None:
    """Each row is in one batch, wide enough for it, within the budget or alone."""
    batches = by_budget(np.array(lengths), Budget(batch_size=size, tokens=1024), None)
    rows = np.concatenate([rows for rows, _ in batches])
    assert sorted(rows) == list(range(len(lengths)))
    for rows, width in batches:
        assert max(lengths[row] for row in rows) <= width
        assert len(rows) == 1 or size or len(rows) * width <= 1024


@given(length=st.integers(1, 100_000))
def test_a_bucket_wastes_less_than_an_eighth(length: int) -> None:
    """Padding to a bucket costs at most an eighth, and there are at most 8 buckets per doubling."""
    width = bucket(length, None)
    assert length <= width <= length * 9 / 8
    assert bucket(width, None) == width
