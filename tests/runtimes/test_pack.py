"""pack writes what one machine needs of a bundle, and it opens there without a word."""

from __future__ import annotations

import logging
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memopt import ArrowEngine, open_bundle
from memopt.bundle import Bundle
from memopt.errors import BundleError, ConfigurationError, DeviceError
from memopt.runtimes.cpu import machine_key
from memopt.runtimes.pack import pack


def test_the_packed_bundle_is_small_whole_and_silent(
    minilm: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One variant with what it reads; hashes hold; the same vectors; no fallback, no warning."""
    packed = pack(minilm, tmp_path / "box")
    bundle = open_bundle(tmp_path / "box")
    assert packed.variants == tuple(bundle.manifest.variants) == ("onnx-fp32-fused",)
    assert bundle.verify() == []
    there = {str(p.relative_to(bundle.path)) for p in bundle.path.rglob("*") if p.is_file()}
    assert there - {"memopt.json"} == set(bundle.manifest.files)
    assert "tokenizer.json" in there
    assert not {"weights.parquet", "vocab.txt", "onnx/model.onnx"} & there
    assert packed.bytes < packed.bytes_before / 2
    caplog.set_level(logging.WARNING)
    with ArrowEngine(bundle) as small, ArrowEngine(minilm, variant="onnx-fp32-fused") as whole:
        assert small.events == ()
        np.testing.assert_array_equal(small.encode(["a cat"]), whole.encode(["a cat"]))
    assert caplog.records == []


def test_a_choice_for_another_runtime_is_not_announced_on_the_box(
    minilm: Bundle, tmp_path: Path
) -> None:
    """Tuned for OpenVINO and packed for the CPU: the streams stay, the choice does not."""
    name = "openvino-fp32"
    record = {"variant": name, "device": "openvino", "streams": {"cpu:onnx-fp32": 2}}
    tuned = Bundle(minilm.path, replace(minilm.manifest, chosen={machine_key(): record}))
    pack(tuned, tmp_path / "cpu", variants=["onnx-fp32"])
    small = open_bundle(tmp_path / "cpu")
    assert small.manifest.chosen == {machine_key(): {"streams": {"cpu:onnx-fp32": 2}}}
    pack(tuned, tmp_path / "ov", target="openvino")
    there = open_bundle(tmp_path / "ov").manifest
    assert list(there.variants) == [name]
    assert there.chosen[machine_key()]["variant"] == name
    assert {"openvino/openvino_model.xml", "openvino/openvino_model.bin"} <= set(there.files)


def test_an_archive_holds_the_same_and_is_the_same_each_time(
    minilm: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A .tar unpacks into one folder; packing twice gives the same bytes."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    pack(minilm, tmp_path / "box.tar", variants=["onnx-fp32-fused"])
    pack(minilm, tmp_path / "again" / "box.tar", variants=["onnx-fp32-fused"])
    with tarfile.open(tmp_path / "box.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    assert open_bundle(tmp_path / "box").verify() == []
    assert (tmp_path / "box.tar").read_bytes() == (tmp_path / "again" / "box.tar").read_bytes()


def test_what_cannot_be_packed_is_refused_and_leaves_nothing(
    minilm: Bundle, tmp_path: Path
) -> None:
    """Unknown names, what failed its gate, the wrong target, damaged files, a full folder."""
    out = tmp_path / "out"
    with pytest.raises(BundleError, match=r"onnx-fp23.*onnx-fp32"):
        pack(minilm, out, variants=["onnx-fp23"])
    with pytest.raises(BundleError, match="cannot run on cpu"):
        pack(minilm, out, variants=["openvino-fp32"])
    with pytest.raises(DeviceError, match="unknown device"):
        pack(minilm, out, target="tpu")
    with pytest.raises(ConfigurationError, match="lies inside"):
        pack(minilm, minilm.path / "box")
    failed = {n: replace(v, passed=False) for n, v in minilm.manifest.variants.items()}
    bad = Bundle(minilm.path, replace(minilm.manifest, variants=failed))
    with pytest.raises(BundleError, match="failed its quality gate"):
        pack(bad, out, variants=["onnx-fp32"])
    copy = tmp_path / "copy"
    shutil.copytree(minilm.path, copy, ignore=shutil.ignore_patterns(".*", "*.parquet", "openvino"))
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer.json differs.*info"):
        pack(copy, out)
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(ConfigurationError, match="there already"):
        pack(minilm, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "out"]
    assert [p.name for p in out.iterdir()] == ["mine"]
