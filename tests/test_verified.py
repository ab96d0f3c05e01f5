"""A changed or swapped file is refused by whatever opens it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from memopt.bundle import Bundle, create_bundle
from memopt.errors import BundleError, ConfigurationError
from memopt.exporters.base import export
from memopt.runtimes.engine import ArrowEngine
from memopt.verified import has_hash
from memopt.weights.convert import to_safetensors
from memopt.weights.reader import WeightLoader
from memopt.weights.writer import write_weights


def swapped(bundle: Bundle) -> None:
    """Put other weights of the same names, shapes and size in place of the bundle's."""
    with WeightLoader(bundle.weights) as loader:
        weights = {name: np.array(array) for name, array in loader.items()}
    first = next(name for name, array in weights.items() if array.dtype.kind == "f")
    weights[first] = weights[first] + 1
    write_weights(bundle.weights, weights)


def test_swapped_weights_are_refused_by_export_and_conversion(tiny_copy: Bundle) -> None:
    """Nothing is made of weights that are not the bundle's."""
    swapped(tiny_copy)
    with pytest.raises(BundleError, match=r"weights\.parquet is not the file that memopt\.json"):
        export(tiny_copy)
    with pytest.raises(BundleError, match="is not the file"):
        to_safetensors(tiny_copy)
    assert not (tiny_copy.path / "onnx").exists()
    assert not (tiny_copy.path / "model.safetensors").exists()


def test_a_swapped_graph_is_refused_and_no_other_takes_over(minilm_copy: Bundle) -> None:
    """A changed graph is no failure of a provider."""
    variant = minilm_copy.manifest.variants["onnx-fp32"]
    path = minilm_copy.file(variant)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="changed or swapped"):
        ArrowEngine(minilm_copy, device="cpu", variant=variant.name)
    with ArrowEngine(minilm_copy, device="cpu", variant=variant.name, verify="never") as engine:
        assert engine.dimension == 384
    with pytest.raises(ConfigurationError, match="verify 'somtimes' is unknown"):
        ArrowEngine(minilm_copy, device="cpu", verify="somtimes")


def test_every_file_is_read_with_always(minilm_copy: Bundle) -> None:
    """open leaves small files to their owner; always does not."""
    (minilm_copy.path / "vocab.txt").write_text("edited\n")
    with ArrowEngine(minilm_copy, device="cpu", variant="onnx-fp32") as engine:
        assert engine.dimension == 384
    with pytest.raises(BundleError, match=r"vocab\.txt is not the file"):
        ArrowEngine(minilm_copy, device="cpu", variant="onnx-fp32", verify="always")


def test_hashes_are_remembered_by_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is read once for each size and time; a later one is read again, in any process."""
    from memopt import verified

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "_REMEMBERED_BYTES", 1)
    read: list[Path] = []
    known = verified.sha256_file
    monkeypatch.setattr(verified, "sha256_file", lambda p: (read.append(p), known(p))[1])
    path = tmp_path / "bundle" / "a.bin"
    path.parent.mkdir()
    path.write_bytes(b"first")
    sha256 = known(path)
    for _ in range(2):
        assert has_hash(path, sha256)
        monkeypatch.setattr(verified, "_KNOWN", {})  # another process
    assert len(read) == 1
    assert has_hash(path, sha256, again=True)
    assert len(read) == 2
    path.write_bytes(b"other")
    os.utime(path, (1, 1))
    assert not has_hash(path, sha256)
    assert (tmp_path / "cache" / "memopt" / "verified.json").stat().st_mode & 0o077 == 0
    (tmp_path / "cache" / "memopt" / "verified.json").write_text("{")
    assert not has_hash(path, sha256)


def test_what_is_not_recorded_is_not_compared(tmp_path: Path, tiny: Bundle) -> None:
    """Files the manifest does not know, or that are missing, are for their readers to judge."""
    (tmp_path / "a").write_bytes(b"x")
    bundle = create_bundle(tmp_path, tiny.manifest)
    bundle.check("a", "b")
    (tmp_path / "a").write_bytes(b"longer")
    with pytest.raises(BundleError, match="is not the file"):
        bundle.check("a")
