"""The manifest: strict, whole on disk, safe under concurrent writers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from memopt.bundle import MANIFEST, Bundle, Manifest, Variant, create_bundle, open_bundle
from memopt.errors import BundleError


def manifest(**changes: object) -> Manifest:
    values = {
        "name": "tiny",
        "task": "embedding",
        "modality": "text",
        "architecture": "BertModel",
        "model_type": "bert",
    }
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"graph")
    return create_bundle(tmp_path, manifest())


def variant(name: str = "onnx-fp32", **changes: object) -> Variant:
    values = {"name": name, "format": "onnx", "precision": "fp32", "file": "onnx/model.onnx"}
    return Variant(**{**values, **changes})  # type: ignore[arg-type]


def test_a_manifest_reads_back_as_it_was_written(bundle: Bundle) -> None:
    """JSON and back is the identity, nested variants included."""
    changed = bundle.add_variants(
        variant(check={"min_cosine": 1.0, "max_abs_error": 0.0}, companions=("config.json",)),
        event={"event": "export", "opset": 20},
    )
    assert open_bundle(bundle.path).manifest == changed.manifest
    assert Manifest.from_json(changed.manifest.to_json(), origin="x") == changed.manifest
    assert asdict(changed.manifest.variants["onnx-fp32"])["inputs"] == ()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.update(colour="red"), "colour"),
        (lambda raw: raw.pop("task"), "task"),
        (lambda raw: raw.update(task="dancing"), r"memopt\.json: task 'dancing'"),
        (lambda raw: raw.update(max_length="long"), "max_length 'long' is not a whole number"),
        (lambda raw: raw.update(dimension=0), "dimension 0 is not a whole number above 0"),
        (lambda raw: raw.update(normalize="yes"), "normalize 'yes'"),
        (lambda raw: raw["files"].update(x={"bytes": 1}), "'x' lacks sha256"),
        (lambda raw: raw.update(format_version=99), "format version 99"),
        (lambda raw: raw["variants"].update(v={"name": "v"}), "format"),
    ],
)
def test_a_damaged_manifest_is_refused_with_what_is_wrong(
    bundle: Bundle, edit: object, message: str
) -> None:
    """Unknown, missing and newer content is an error, never ignored."""
    raw = json.loads((bundle.path / MANIFEST).read_text())
    edit(raw)  # type: ignore[operator]
    (bundle.path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle.path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_manifest_that_is_not_json_is_refused(bundle: Bundle, content: bytes) -> None:
    """Truncated or foreign bytes give one BundleError that names the file."""
    (bundle.path / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"memopt\.json"):
        open_bundle(bundle.path)


def test_verify_names_every_file_that_changed_or_vanished(bundle: Bundle) -> None:
    """A flipped byte and a missing file are both found; an intact bundle has no problem."""
    assert bundle.verify() == []
    (bundle.path / "onnx" / "model.onnx").write_bytes(b"grapH")
    (bundle.path / "config.json").unlink()
    assert bundle.verify() == [
        "config.json: missing",
        "onnx/model.onnx: SHA-256 differs from the manifest",
    ]


@pytest.mark.parametrize("file", ["/etc/passwd", "../outside.onnx"])
def test_a_variant_cannot_point_outside_its_bundle(file: str) -> None:
    """A manifest from a stranger cannot make the runtime open another file."""
    with pytest.raises(BundleError, match="outside the bundle"):
        variant(file=file)


def test_an_unknown_variant_names_the_nearest(bundle: Bundle) -> None:
    """The message says which variants there are, or how to make one."""
    with pytest.raises(BundleError, match="memopt export"):
        bundle.variant("onnx-fp32")
    changed = bundle.add_variants(variant(), event={"event": "export"})
    with pytest.raises(BundleError, match="did you mean 'onnx-fp32'"):
        changed.variant("onnx-fp23")


def test_concurrent_writers_lose_nothing(bundle: Bundle) -> None:
    """Eight processes each add a variant at once; all eight are there afterwards."""
    script = (
        "import sys; from memopt.bundle import Variant, open_bundle;"
        "open_bundle(sys.argv[1]).add_variants(Variant(name=sys.argv[2], format='onnx',"
        "precision='fp32', file='onnx/model.onnx'), event={'event': 'export'})"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(bundle.path), f"v{i}"])
        for i in range(8)
    ]
    assert [p.wait() for p in processes] == [0] * 8
    after = open_bundle(bundle.path).manifest
    assert sorted(after.variants) == [f"v{i}" for i in range(8)]
    assert len(after.history) == 8
