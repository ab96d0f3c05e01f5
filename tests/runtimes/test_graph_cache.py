"""The cached optimized graph gives the same answers, is remade when stale, may be damaged."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from memopt.bundle import Bundle
from memopt.runtimes import graph_cache
from memopt.runtimes.engine import ArrowEngine

TEXTS = ["a cat", "a dog on a hill", ""]


def encode(bundle: Bundle) -> np.ndarray:
    with ArrowEngine(bundle, device="cpu", variant="onnx-fp32-fused") as engine:
        return engine.encode(TEXTS)


def cached(bundle: Bundle) -> list[Path]:
    folder = bundle.path / "onnx" / graph_cache.FOLDER
    return sorted(folder.iterdir()) if folder.is_dir() else []


@pytest.fixture
def bundle(minilm_copy: Bundle) -> Bundle:
    for path in cached(minilm_copy):
        path.unlink()
    return minilm_copy


def test_the_second_open_reads_the_cache(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of the model itself; the graph is made once and then gives the same bits."""
    monkeypatch.setenv(graph_cache.SWITCH, "0")
    plain = encode(bundle)
    assert cached(bundle) == []
    monkeypatch.delenv(graph_cache.SWITCH)
    first = encode(bundle)
    np.testing.assert_allclose(first, plain, atol=1e-6)
    assert [path.suffix for path in cached(bundle)] == [".bin", ".onnx"]
    stamps = [path.stat().st_mtime_ns for path in cached(bundle)]
    np.testing.assert_array_equal(encode(bundle), first)
    assert [path.stat().st_mtime_ns for path in cached(bundle)] == stamps
    assert bundle.verify() == []


def test_a_changed_model_gets_a_new_cache(bundle: Bundle) -> None:
    """The key holds size and time of the model; what was left of the old one is removed."""
    encode(bundle)
    before = cached(bundle)
    model = bundle.file(bundle.variant("onnx-fp32-fused"))
    os.utime(model, ns=(0, 0))
    encode(bundle)
    after = cached(bundle)
    assert len(after) == 2
    assert not set(before) & set(after)


def test_a_damaged_cache_costs_time_only(bundle: Bundle) -> None:
    """A truncated graph, truncated weights, or no weights at all: removed and made again."""
    right = encode(bundle)
    for number, size in ((1, 100), (0, 1000), (0, None)):
        path = cached(bundle)[number]
        if size is None:
            path.unlink()
        else:
            with path.open("r+b") as file:
                file.truncate(size)
        np.testing.assert_allclose(encode(bundle), right, atol=1e-6)
        np.testing.assert_array_equal(encode(bundle), right)
        assert len(cached(bundle)) == 2


def test_an_unwritable_folder_only_means_no_cache(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is opened as it is."""

    def refuse(*arguments: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(graph_cache, "staged_directory", refuse)
    assert encode(bundle).shape == (3, 384)
    assert cached(bundle) == []


def test_a_cache_that_found_too_little_memory_stays(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not damaged: the next open reads it."""
    right, kept = encode(bundle), cached(bundle)

    def refuse(*arguments: object) -> None:
        raise RuntimeError("Exception during initialization: std::bad_alloc")

    with monkeypatch.context() as patch:
        patch.setattr(graph_cache, "_open", refuse)
        np.testing.assert_allclose(encode(bundle), right, atol=1e-6)
    assert "could not be used" in caplog.text
    assert cached(bundle) == kept
