"""The manifest: strict, whole on disk, safe under concurrent writers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import memopt.bundle
import memopt.files
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


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "../outside.onnx", "a" * 300, "\ud83d.onnx", "a\0b"], ids=ascii
)
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


def interrupted_at(line: int, work: Callable[[], object]) -> bool:
    """Do the work with Ctrl-C at the n-th line that bundle.py and files.py run; whether it came."""
    ours = {memopt.bundle.__file__, memopt.files.__file__}
    left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in ours:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_files_and_manifest_change_together(tmp_path: Path) -> None:
    """Ctrl-C at any line: the old graph with the old manifest, or the new with the new."""
    outcomes = []
    line = 0
    came = True
    while came:
        line += 1
        folder = tmp_path / str(line)
        (folder / "onnx").mkdir(parents=True)
        (folder / "onnx" / "model.onnx").write_bytes(b"old")
        made = create_bundle(folder, manifest())
        staged = {"onnx/model.data": folder / ".staged-data", "onnx/model.onnx": folder / ".staged"}
        for name, file in staged.items():
            file.write_bytes(f"new {name}".encode())
        new = variant(companions=("onnx/model.data",))
        came = interrupted_at(
            line, lambda b=made, v=new, s=staged: b.add_variants(v, event={}, staged=s)
        )
        after = open_bundle(folder)
        assert after.verify() == [], line
        assert sorted(p.name for p in (folder / "onnx").iterdir()) == sorted(
            Path(name).name for name in after.manifest.files
        ), line
        outcomes.append("onnx-fp32" in after.manifest.variants)
    assert len(outcomes) > 50
    # Until the manifest is renamed nothing has happened, from then on everything has.
    assert outcomes == sorted(outcomes)
    assert outcomes[-1]


def test_without_hard_links_the_old_file_comes_back_too(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory cards and some network shares have none: the bytes are copied aside."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    staged = bundle.path / ".staged"
    staged.write_bytes(b"new")

    def fail(_: Manifest) -> Manifest:
        monkeypatch.setattr(memopt.bundle, "atomic_path", refuse)
        return replace(bundle.manifest, dimension=3)

    with pytest.raises(PermissionError):
        bundle.update(fail, {"onnx/model.onnx": staged})
    assert (bundle.path / "onnx" / "model.onnx").read_bytes() == b"graph"
    assert bundle.verify() == []
    assert not [p for p in bundle.path.iterdir() if p.name.endswith(".old")]


def test_threads_that_write_leave_the_umask_alone(tmp_path: Path) -> None:
    """A file made beside them is not open to everybody, nor is one made afterwards."""
    before = os.umask(0o027)
    try:

        def write(at: int) -> set[int]:
            modes = set()
            for _ in range(200):
                with memopt.files.atomic_path(tmp_path / f"a{at}") as path:
                    path.write_text("x")
                (tmp_path / f"b{at}").unlink(missing_ok=True)
                (tmp_path / f"b{at}").write_text("y")
                modes |= {(tmp_path / f"{kind}{at}").stat().st_mode & 0o777 for kind in "ab"}
            return modes

        with ThreadPoolExecutor(8) as pool:
            assert set().union(*pool.map(write, range(8))) == {0o640}
    finally:
        assert os.umask(before) == 0o027
