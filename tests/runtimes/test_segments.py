"""Short texts that share rows on OpenVINO: the same vectors, whoever is beside them."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt import ArrowEngine
from memopt.bundle import Bundle, open_bundle
from memopt.exporters.base import export
from memopt.runtimes import batching, openvino
from memopt.runtimes.base import Settings
from memopt.runtimes.batching import Budget, by_budget
from memopt.runtimes.openvino import OpenvinoBackend
from memopt.runtimes.segments import ROW, shares, sharing, together

WORDS = ["the", "cat", "sat", "on", "a", "mat", "with", "dog", "zebra", "quiz"]

FEW = ["the quiz of the zebra quiz", "a dog with a mat with a quiz"]  # of 33 to 64 tokens


def texts(count: int, most: int = 12, seed: int = 0) -> list[str]:
    """Seeded texts of 1 to ``most`` words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, most + 1))) for _ in range(count)]


@pytest.fixture(scope="module")
def shared(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny BERT as an OpenVINO graph."""
    folder = tmp_path_factory.mktemp("segments") / "tiny"
    bundle = open_bundle(shutil.copytree(tiny.path, folder))
    export(bundle, format="openvino")
    return open_bundle(folder)


def backend_of(engine: ArrowEngine) -> OpenvinoBackend:
    backend = engine._chain.backend
    assert isinstance(backend, OpenvinoBackend)
    return backend


lengths = st.lists(st.integers(1, ROW), min_size=1, max_size=80)


@given(lengths)
def test_every_text_lies_in_one_row_and_rows_overflow_never(sizes: list[int]) -> None:
    """None is lost, none is there twice; two rows that fit together are one."""
    rows = shares(sizes, ROW)
    assert sorted(text for row in rows for text in row) == list(range(len(sizes)))
    filled = sorted(sum(sizes[text] for text in row) for row in rows)
    assert filled[-1] <= ROW
    assert len(rows) == 1 or filled[0] + filled[1] > ROW


@given(lengths)
def test_what_is_placed_can_be_read_back(sizes: list[int]) -> None:
    """The tokens of a number of a row are those of its text, in order, and numbers count from 1."""
    width = max(sizes)
    mask = (np.arange(width) < np.array(sizes)[:, None]).astype(np.int64)
    ids = np.arange(mask.size).reshape(mask.shape) + 1
    packed, order = together({"input_ids": ids, "attention_mask": mask}, ROW)
    assert {value.shape[1] for value in packed.values()} == {ROW}
    back = [
        row[numbers == number].tolist()
        for row, numbers in zip(packed["input_ids"], packed["attention_mask"], strict=True)
        for number in range(1, numbers.max() + 1)
    ]
    assert back == [ids[text, : sizes[text]].tolist() for text in order]
    assert packed["input_ids"][packed["attention_mask"] == 0].sum() == 0


@given(st.lists(st.integers(0, 200), min_size=1, max_size=120))
def test_batches_hold_every_text_once(sizes: list[int]) -> None:
    """Texts longer than a row are batched as before, the others to the width of a row."""
    batches = by_budget(np.array(sizes, np.intp), Budget(row=ROW, step=16), None)
    assert sorted(row for rows, _ in batches for row in rows.tolist()) == list(range(len(sizes)))
    for rows, width in batches:
        longest = max(sizes[row] for row in rows)
        assert longest <= width
        few = len(sizes) == 1 or sum(sizes) <= ROW // 2
        assert few or (width == ROW) == (longest <= ROW) or len(rows) == 1


def test_a_batch_size_means_what_it_says() -> None:
    """So many inputs, padded to the longest, as on every backend."""
    batches = by_budget(np.array([5, 9, 7], np.intp), Budget(row=ROW, batch_size=2), None)
    assert [(len(rows), width) for rows, width in batches] == [(2, 9), (1, 5)]


def test_only_whole_texts_from_the_left_share_rows() -> None:
    """A mask with holes, or padded on the left, goes through as it is."""
    mask = np.zeros((2, ROW), np.int64)
    mask[:, :4] = 1
    assert sharing({"attention_mask": mask})
    for place in ((0, 6), (1, 0)):
        odd = mask.copy()
        odd[place] = 1 - odd[place]
        assert not sharing({"attention_mask": odd})
    assert not sharing({"attention_mask": mask[:, 1:]})


def test_vectors_are_those_of_each_text_alone(shared: Bundle) -> None:
    """Of any number of texts; empty ones, long ones and equal ones among them."""
    many = [*texts(90), "", "", *texts(3, 60, seed=1), "the cat", "the cat"]
    with ArrowEngine(shared, device="openvino") as engine:
        assert backend_of(engine).row == ROW
        alone = np.concatenate([engine.encode([text]) for text in many])
        for count in (2, 3, 17, len(many)):
            np.testing.assert_allclose(engine.encode(many[:count]), alone[:count], atol=1e-6)
        np.testing.assert_allclose(engine.encode(many, batch_size=8), alone, atol=1e-6)
    with ArrowEngine(shared, device="torch") as engine:
        np.testing.assert_allclose(alone, engine.encode(many), atol=1e-5)


def test_rows_get_graphs_of_their_own(shared: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some calls; they give the same vectors, alone and beside each other."""
    monkeypatch.setattr(openvino, "_CALLS_BEFORE_ROWS", 2)
    monkeypatch.setattr(batching, "MOST_SHARING", 4096)
    many = texts(400)
    with ArrowEngine(shared, device="openvino", streams=2, threads=2) as engine:
        backend = backend_of(engine)
        first = engine.encode(many)
        few = engine.encode(FEW)
        for rows in (backend._rows, backend._rows_many):
            assert rows is not None
            assert rows._shapes is not None
            while len(rows._shapes._ready) < len(rows._heights):
                engine.encode(many)
                engine.encode(FEW)
                time.sleep(0.02)
        free, backend._single = backend._single, None  # type: ignore[assignment]
        streams, backend._many = backend._many, None
        np.testing.assert_allclose(engine.encode(many), first, atol=1e-6)
        np.testing.assert_allclose(engine.encode(FEW), few, atol=1e-6)
        np.testing.assert_allclose(engine.encode(many[:2]), first[:2], atol=1e-6)
        backend._single, backend._many = free, streams


def test_a_memory_limit_leaves_the_graphs_of_rows_out(
    shared: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are shared all the same, on the graph of any shape."""
    monkeypatch.setattr(openvino, "_CALLS_BEFORE_ROWS", 1)
    monkeypatch.setattr(openvino, "resident_mb", lambda: 100.0)
    size = shared.file(shared.variant("openvino-fp32")).with_suffix(".bin").stat().st_size / 2**20
    for limit, graphs in ((100 + 20 * size, True), (100 + size, False)):
        with ArrowEngine(shared, device="openvino", verify="never") as engine:
            settings = Settings(memory_limit_mb=limit)
            backend = OpenvinoBackend(shared, engine._chain.candidate, settings)
        assert backend._rows is not None
        assert backend.row == ROW
        assert (backend._rows._shapes is not None) == (backend._fixed is not None) == graphs
        backend.close()


def test_large_requests_are_sorted_instead(shared: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have hardly any padding, nor many shapes."""
    monkeypatch.setattr(batching, "MOST_SHARING", 10)
    widths: list[int] = []
    whole = OpenvinoBackend._infer

    def watched(self: OpenvinoBackend, requests: Any, feed: Any, rows: Any) -> Any:
        widths.append(feed["attention_mask"].shape[1])
        return whole(self, requests, feed, rows)

    monkeypatch.setattr(OpenvinoBackend, "_infer", watched)
    with ArrowEngine(shared, device="openvino") as engine:
        engine.encode(texts(10))
        assert set(widths) == {ROW}
        widths.clear()
        engine.encode(texts(11))
        assert max(widths) < ROW


def test_threads_share_the_graphs(shared: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at once, while the graphs of rows are being made."""
    monkeypatch.setattr(openvino, "_CALLS_BEFORE_ROWS", 3)
    many = texts(60)
    wrong: list[float] = []
    with ArrowEngine(shared, device="openvino") as engine:
        right = np.concatenate([engine.encode([text]) for text in many])

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(30):
                chosen = rng.choice(len(many), rng.integers(2, 20))
                vectors = engine.encode([many[i] for i in chosen])
                wrong.append(float(np.abs(vectors - right[chosen]).max()))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(wrong) == 120
    assert max(wrong) < 1e-6


def test_a_file_that_does_not_say_so_gets_one_text_a_row(shared: Bundle, tmp_path: Path) -> None:
    """As every file written before there were shared rows."""
    old = open_bundle(shutil.copytree(shared.path, tmp_path / "old"))
    path = old.path / old.variant("openvino-fp32").file
    text = path.read_text()
    assert "segments" in text
    path.write_text(text.replace("<segments", "<before").replace("</segments", "</before"))
    with ArrowEngine(old, device="openvino", verify="never") as engine:
        assert backend_of(engine).row == 0
        few = engine.encode(texts(9))
    with ArrowEngine(shared, device="openvino") as engine:
        np.testing.assert_allclose(few, engine.encode(texts(9)), atol=1e-6)
