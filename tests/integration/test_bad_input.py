"""The command line on bad input: one line, an exit code, and no file left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memopt.bundle import Bundle

MEMOPT = [sys.executable, "-m", "memopt"]


def memopt(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MEMOPT, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False
    )


def refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Check that a command failed with exactly one error line that holds every part."""
    assert result.returncode in (1, 2), result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for part in parts:
        assert part in errors[0]


def files_below(folder: Path) -> list[str]:
    """Every file below ``folder``, hidden ones included, except the manifest's lock."""
    if not folder.exists():
        return []
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != ".memopt.lock")
    return sorted(str(p.relative_to(folder)) for p in found)


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_source, tmp_path / "source"))


@pytest.fixture
def bundle(tiny: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.path, tmp_path / "bundle"))


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    """A source that is no folder, package, known name or reachable hub id is refused."""
    refused(memopt("convert", tmp_path / "gone", "-o", tmp_path / "out"), "gone")
    assert files_below(tmp_path / "out") == []


def test_truncated_safetensors_are_refused(source: Path, tmp_path: Path) -> None:
    """A checkpoint cut in its data, its header or its first bytes is named, nothing is written."""
    file = source / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 100, 200, 4, 0):
        file.write_bytes(whole[:size])
        refused(memopt("convert", source, "-o", tmp_path / "out"), "model.safetensors")
        assert files_below(tmp_path / "out") == []


def test_a_failed_convert_keeps_the_old_bundle(source: Path, tmp_path: Path) -> None:
    """Converting a damaged checkpoint over a good bundle leaves the good one whole."""
    assert memopt("convert", source, "-o", tmp_path / "out").returncode == 0
    before = files_below(tmp_path / "out")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(memopt("convert", source, "-o", tmp_path / "out"), "model.safetensors")
    assert files_below(tmp_path / "out") == before
    assert memopt("info", tmp_path / "out", "--verify").returncode == 0


def test_a_pickle_checkpoint_is_refused_with_the_way_out(source: Path, tmp_path: Path) -> None:
    """A .bin is never unpickled; the message says why and what to do instead."""
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(
        memopt("convert", source, "-o", tmp_path / "out"),
        "pytorch_model.bin",
        "pickle",
        "save_pretrained",
    )
    assert files_below(tmp_path / "out") == []


def test_a_config_without_architecture_is_refused(source: Path, tmp_path: Path) -> None:
    """A config.json that does not say what the model is cannot be guessed at."""
    config = json.loads((source / "config.json").read_text())
    for key in ("architectures", "model_type"):
        config.pop(key)
    (source / "config.json").write_text(json.dumps(config))
    refused(memopt("convert", source, "-o", tmp_path / "out"), "config.json")
    assert files_below(tmp_path / "out") == []


def test_nan_weights_are_converted_with_a_warning_that_names_them(
    source: Path, tmp_path: Path
) -> None:
    """NaN in a weight is not lost silently: the warning names the tensor."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] = np.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = memopt("convert", source, "-o", tmp_path / "out")
    assert result.returncode == 0
    assert name in result.stderr
    assert "NaN" in result.stderr


def test_truncated_parquet_is_refused(bundle: Path) -> None:
    """Export of a bundle with a cut weight file writes no graph."""
    file = bundle / "weights.parquet"
    whole = file.read_bytes()
    for size in (len(whole) // 2, 10, 0):
        file.write_bytes(whole[:size])
        refused(memopt("export", bundle, "--format", "onnx"), "weights.parquet")
    assert not (bundle / "onnx").exists()


def test_parquet_without_a_column_is_refused(bundle: Path) -> None:
    """The missing column is named."""
    table = pq.read_table(bundle / "weights.parquet").drop_columns(["shape"])
    pq.write_table(table, bundle / "weights.parquet")
    refused(memopt("export", bundle, "--format", "onnx"), "weights.parquet", "shape")
    assert not (bundle / "onnx").exists()


def test_a_row_whose_length_disagrees_with_its_shape_is_named(bundle: Path) -> None:
    """A V1 row with the wrong number of values is refused with the weight's name."""
    table = pq.read_table(bundle / "weights.parquet")
    shapes = table["shape"].to_pylist()
    row = next(i for i, shape in enumerate(shapes) if len(shape) == 2)
    shapes[row] = [shapes[row][0] + 1, shapes[row][1]]
    column = pa.array(shapes, table.schema.field("shape").type)
    index = table.schema.get_field_index("shape")
    changed = table.set_column(index, table.schema.field("shape"), column)
    pq.write_table(changed, bundle / "weights.parquet", row_group_size=1)
    weight = table["weight_name"][row].as_py()
    refused(memopt("export", bundle, "--format", "onnx"), weight)
    assert not (bundle / "onnx").exists()


def test_unknown_device_and_variant_name_the_nearest(minilm: Bundle, tmp_path: Path) -> None:
    """A typo is answered with what there is."""
    text = tmp_path / "a.txt"
    text.write_text("a cat\n")
    out = tmp_path / "out.npy"
    base = ("embed", minilm.path, "-i", text, "-o", out)
    refused(memopt(*base, "--device", "opnvino"), "opnvino", "openvino")
    refused(memopt(*base, "--variant", "onnx-fp23"), "onnx-fp23", "onnx-fp32")
    assert not out.exists()


def test_a_text_file_that_is_not_utf8_is_named(minilm: Bundle, tmp_path: Path) -> None:
    """The file and the position of the first bad byte are in the message."""
    text = tmp_path / "latin.txt"
    text.write_bytes("a caf\xe9\n".encode("latin-1"))
    result = memopt("embed", minilm.path, "-i", text, "-o", tmp_path / "out.npy")
    refused(result, "latin.txt", "UTF-8")
    assert files_below(tmp_path) == ["latin.txt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_nothing(source: Path, small_disk: Path) -> None:
    """Convert onto a disk that is too small ends with one line and no file."""
    (small_disk / "filler").write_bytes(b"x" * 150_000)
    refused(memopt("convert", source, "-o", small_disk / "out"), "space")
    assert files_below(small_disk) == ["filler"]


def test_a_full_disk_during_export_keeps_the_bundle(bundle: Path, small_disk: Path) -> None:
    """Export without room for the graph leaves the bundle as it was."""
    inside = small_disk / "bundle"
    shutil.copytree(bundle, inside)
    before = files_below(inside)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(b"x" * max(0, free - 20_000))
    refused(memopt("export", inside, "--format", "onnx"), "space")
    assert files_below(inside) == before


def test_openvino_says_that_the_disk_is_full(small_disk: Path) -> None:
    """Its own writer only knows of an iostream error; the command line names the disk."""
    import openvino as ov
    from openvino import opset13 as ops

    from memopt.runtimes.openvino_file import save_openvino

    x = ops.parameter([1, 512], np.float32)
    product = ops.matmul(x, np.ones((512, 512), np.float32), False, False)
    with pytest.raises(OSError, match="No space left on device"):
        save_openvino(ov.Model([product], [x]), small_disk / "model.xml")


@pytest.mark.usefixtures("unmeasured")
def test_interrupting_an_export_leaves_nothing(bundle: Path) -> None:
    """Ctrl-C and `kill` at several moments of an export leave the bundle's files as they were."""
    before = files_below(bundle)
    manifest = (bundle / "memopt.json").read_bytes()
    for delay, number in ((0.3, signal.SIGINT), (3.0, signal.SIGTERM), (6.0, signal.SIGINT)):
        process = subprocess.Popen(
            [*MEMOPT, "export", str(bundle), "--format", "onnx"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        time.sleep(delay)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            break  # The export was faster than the delay: nothing to interrupt any more.
        assert "Traceback" not in errors
        assert files_below(bundle) == before
        assert (bundle / "memopt.json").read_bytes() == manifest


def test_a_signal_after_the_work_does_not_look_like_a_failure() -> None:
    """A command that is through keeps its exit code, whatever arrives while Python shuts down."""
    script = (
        "import atexit, os, signal, sys; from memopt.cli import main; "
        "atexit.register(lambda: os.kill(os.getpid(), signal.{name})); "
        "sys.argv = ['memopt', 'config', 'show']; main()"
    )
    for name in ("SIGTERM", "SIGINT"):
        done = subprocess.run(
            [sys.executable, "-c", script.format(name=name)], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout
