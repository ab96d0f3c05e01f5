"""Encrypted bundles: made by a command, opened by engine, export and quantize, by nobody else."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from memopt.bundle import Bundle, open_bundle
from memopt.cli import app
from memopt.errors import ConfigurationError, WeightsError
from memopt.runtimes.engine import ArrowEngine
from memopt.sealing import KEY_FILE_VARIABLE, KEY_VARIABLE, load_key
from memopt.weights import locked
from memopt.weights.crypto import MAGIC
from memopt.weights.locked import encrypt_bundle

TEXTS = ["a bird on the roof", "rain"]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (KEY_VARIABLE, KEY_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(autouse=True)
def private_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where private folders are made; in the shared places other tests make theirs meanwhile."""
    place = tmp_path / "private"
    place.mkdir()
    monkeypatch.setattr(locked, "_MEMORY", place)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def private_folders(place: Path) -> set[Path]:
    return set(place.glob("memopt-*"))


def test_a_bundle_is_encrypted_opened_and_decrypted(
    minilm_copy: Bundle, tmp_path: Path, private_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of weights stays in the clear; with the key the vectors are the same."""
    path, key = minilm_copy.path, tmp_path / "keys" / "key"
    whole = {n: (path / n).read_bytes() for n in minilm_copy.manifest.files}
    with ArrowEngine(minilm_copy, device="cpu", variant="onnx-fp32") as engine:
        expected = engine.encode(TEXTS)
    assert (path / "onnx" / ".ort-cache").is_dir()
    run("encrypt", path, "--new-key", "--key-file", key)
    assert key.stat().st_mode & 0o077 == 0
    for file in path.rglob("*"):
        if file.suffix in (".parquet", ".onnx", ".bin", ".data"):
            assert file.read_bytes().startswith(MAGIC), file
            assert file.stat().st_mode & 0o077 == 0
    assert not (path / "onnx" / ".ort-cache").exists()
    assert open_bundle(path).verify() == []
    with pytest.raises(ConfigurationError, match="no key for the weights"):
        ArrowEngine(path, device="cpu", variant="onnx-fp32")

    monkeypatch.setenv(KEY_FILE_VARIABLE, str(key))
    before = private_folders(private_place)
    with ArrowEngine(path, device="cpu", variant="onnx-fp32") as engine:
        np.testing.assert_array_equal(engine.encode(TEXTS), expected)
        (private,) = private_folders(private_place) - before
        assert private.stat().st_mode & 0o077 == 0
        assert not (private / "weights.parquet").exists()  # only what was needed
    assert private_folders(private_place) == before
    assert not list(path.rglob(".ort-cache"))

    monkeypatch.setenv(KEY_VARIABLE, "11" * 32)
    with pytest.raises(WeightsError, match="a wrong key, or the file was changed"):
        ArrowEngine(path, device="cpu", variant="onnx-fp32")
    assert private_folders(private_place) == before
    monkeypatch.delenv(KEY_VARIABLE)
    run("encrypt", path, "--undo")
    assert {n: (path / n).read_bytes() for n in minilm_copy.manifest.files} == whole
    assert open_bundle(path).verify() == []


def test_what_commands_make_of_encrypted_weights_is_encrypted(
    tiny: Bundle, tmp_path: Path, private_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Export reads the weights with the key, and its graphs are under it too."""
    path = Path(shutil.copytree(tiny.path, tmp_path / "tiny"))
    monkeypatch.setenv(KEY_VARIABLE, "22" * 32)
    run("encrypt", path)
    before = private_folders(private_place)
    run("export", path, "--format", "onnx")
    bundle = open_bundle(path)
    assert bundle.encrypted
    assert set(bundle.manifest.variants) >= {"onnx-fp32"}
    assert (path / "onnx" / "model.onnx").read_bytes().startswith(MAGIC)
    assert bundle.verify() == []
    with ArrowEngine(path, device="cpu") as engine:
        assert np.isfinite(engine.encode(TEXTS)).all()
    run("convert", path, "--to", "safetensors", "-o", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").is_file()
    assert private_folders(private_place) == before


def test_a_changed_byte_is_refused(
    tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encrypted files are authenticated: nothing is made of one that was changed."""
    path = Path(shutil.copytree(tiny.path, tmp_path / "tiny"))
    monkeypatch.setenv(KEY_VARIABLE, "22" * 32)
    encrypt_bundle(open_bundle(path), load_key())
    data = bytearray((path / "weights.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "weights.parquet").write_bytes(data)
    with pytest.raises(WeightsError, match="was changed"):
        run("export", path, "--format", "onnx")
    assert not (path / "onnx").exists()


def test_a_key_is_never_overwritten(tiny: Bundle, tmp_path: Path) -> None:
    """--new-key refuses a file that is there: it may be the only key of other bundles."""
    (tmp_path / "key").write_text("mine")
    with pytest.raises(ConfigurationError, match="exists already"):
        run("encrypt", tiny.path, "--new-key", "--key-file", tmp_path / "key")
    assert (tmp_path / "key").read_text() == "mine"
    assert not open_bundle(tiny.path).encrypted
