"""Parquet weights as a source: files of others, written plainly with pyarrow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from memopt import ArrowEngine
from memopt.bundle import open_bundle
from memopt.cli import app
from memopt.errors import BundleError, ConfigurationError, WeightsError
from memopt.weights.convert import convert
from memopt.weights.reader import WeightLoader

TEXTS = ["a cat", "the dog and the cat"]
NAMES = [("layer_name", pa.string()), ("weight_name", pa.string())]
SHAPE = ("shape", pa.list_(pa.int32()))
V1 = pa.schema([*NAMES, ("weight_data", pa.list_(pa.float16())), SHAPE])
V2 = pa.schema(
    [
        *NAMES,
        ("weight_data", pa.list_(pa.int8())),
        SHAPE,
        ("quant_type", pa.string()),
        ("scales", pa.list_(pa.float32())),
        ("zero_points", pa.list_(pa.int8())),
        ("quant_axis", pa.int32()),
    ]
)
LIMITS = {"int8": (-128, 127), "int2": (-2, 1)}


def row(name: str, values: np.ndarray) -> dict[str, Any]:
    layer, _, weight = name.rpartition(".")
    data = values.reshape(-1).tolist()
    return {
        "layer_name": layer,
        "weight_name": weight,
        "weight_data": data,
        "shape": values.shape,
    }


def quantized(name: str, values: np.ndarray, kind: str, *, per_channel: bool) -> dict[str, Any]:
    """Symmetric: a row of scales along the first axis, or one scale for all; a byte a value."""
    low, high = LIMITS[kind]
    each = np.abs(values.reshape(len(values), -1)).max(1) if per_channel else np.abs(values).max()
    scales = np.atleast_1d(each / high).astype(np.float32)
    spread = scales.reshape(-1, *[1] * (values.ndim - 1)) if per_channel else scales
    with np.errstate(all="ignore"):
        integers = np.nan_to_num(np.clip(np.round(values / spread), low, high))
    return {
        **row(name, integers.astype(np.int8)),
        "quant_type": kind,
        "scales": scales.tolist(),
        "zero_points": [0] * len(scales),
        "quant_axis": 0 if per_channel else -1,
    }


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


@pytest.fixture
def weights(tiny_source: Path) -> dict[str, np.ndarray]:
    """The tiny BERT's own weights."""
    return dict(load_file(tiny_source / "model.safetensors"))


@pytest.fixture
def config(tiny_source: Path, tmp_path: Path) -> Path:
    """Its folder without them."""
    folder = Path(shutil.copytree(tiny_source, tmp_path / "config"))
    (folder / "model.safetensors").unlink()
    return folder


def test_float_weights_of_others_are_converted(
    weights: dict[str, np.ndarray], config: Path, tmp_path: Path
) -> None:
    """A V1 file of all weights in one row group, beside its config or far from it."""
    file = write(tmp_path / "w.parquet", [row(n, w) for n, w in weights.items()], V1)
    bundle = convert(file, tmp_path / "a", config=config, on_warning=pytest.fail)
    with WeightLoader(bundle.weights) as loader:
        assert set(loader.names()) == set(weights)
        for name, wanted in weights.items():
            np.testing.assert_array_equal(loader.load(name), wanted.astype(np.float16))
    with ArrowEngine(bundle, device="torch") as engine:
        vectors = engine.encode(TEXTS)
    shutil.copy(file, config / "weights.parquet")
    (config / "other.parquet").write_bytes(b"not looked at")
    for source in (config, config / "weights.parquet"):
        again = convert(source, tmp_path / f"of-{source.name}", on_warning=pytest.fail)
        assert again.manifest.name == "config"
        with ArrowEngine(again, device="torch") as engine:
            np.testing.assert_array_equal(engine.encode(TEXTS), vectors)
    assert bundle.manifest.source == str(file)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("kind", ["int8", "int2"])
def test_quantized_weights_of_others_are_read_as_meant(
    weights: dict[str, np.ndarray], config: Path, tmp_path: Path, kind: str, per_channel: bool
) -> None:
    """V2 with a value a byte, int2 too, a channel of zeros and biases quantized one by one."""
    weights["encoder.layer.0.output.dense.bias"][:] = 0
    rows = [quantized(n, w, kind, per_channel=per_channel) for n, w in weights.items()]
    file = write(tmp_path / "w.parquet", rows, V2)
    lines: list[str] = []
    bundle = convert(file, tmp_path / "bundle", config=config, on_warning=lines.append)
    assert len(lines) == 1
    assert f"{kind} weights, which the bundle has dequantized" in lines[0]
    with WeightLoader(bundle.weights) as loader, WeightLoader(file) as source:
        for made in rows:
            name = f"{made['layer_name']}.{made['weight_name']}"
            integers = np.array(made["weight_data"], np.float32).reshape(made["shape"])
            scales = np.array(made["scales"], np.float32)
            if per_channel:
                scales = scales.reshape(-1, *[1] * (integers.ndim - 1))
            np.testing.assert_array_equal(loader.load(name), integers * scales)
            assert source.load_quantized(name).integers.shape == tuple(made["shape"])
    with ArrowEngine(bundle, device="torch") as engine:
        assert np.isfinite(engine.encode(TEXTS)).all()


def test_halves_cut_to_integers_are_named(
    weights: dict[str, np.ndarray], config: Path, tmp_path: Path
) -> None:
    """pyarrow cuts floats put into an int8 list without a word: what is left is no weight."""
    rows = [quantized(n, w, "int8", per_channel=True) for n, w in weights.items()]
    name = "encoder.layer.1.output.dense.weight"
    kept = row(name, weights[name].astype(np.float16))
    rows[list(weights).index(name)] |= {
        **kept,
        "quant_type": "fp16",
        "scales": [],
        "zero_points": [],
        "quant_axis": -1,
    }
    file = write(tmp_path / "w.parquet", rows, V2)
    with pytest.raises(WeightsError, match=rf"{name}\): quant_type fp16.*cut to integers.*lost"):
        convert(file, tmp_path / "made" / "bundle", config=config)
    assert not (tmp_path / "made" / "bundle").exists()


def test_integers_out_of_their_range_are_refused(tmp_path: Path) -> None:
    """int2 one value a byte holds -2 to 1, nothing else."""
    made = quantized("a.weight", np.ones((2, 8), np.float32), "int2", per_channel=True)
    made["weight_data"][3] = 2
    with (
        WeightLoader(write(tmp_path / "w.parquet", [made], V2)) as loader,
        pytest.raises(
            WeightsError, match=r"from 1 to 2 are not 16 int2 values \(-2\.\.1\), one a byte"
        ),
    ):
        loader.load("a.weight")


def test_a_name_that_is_whole_in_one_column_is_kept(tmp_path: Path) -> None:
    """Other writers put the whole name into weight_name, or all of it into layer_name."""
    ones = np.ones(2, np.float16)
    rows = [
        {**row("dense.bias", ones), "weight_name": "dense.bias"},
        {**row("x.scale", ones), "layer_name": "scale", "weight_name": ""},
    ]
    with WeightLoader(write(tmp_path / "w.parquet", rows, V1)) as loader:
        assert loader.names() == ["dense.bias", "scale"]


def test_float64_weights_are_read(tmp_path: Path) -> None:
    """A table made without a schema has doubles and 64-bit shapes."""
    values = np.linspace(0, 1, 6).reshape(2, 3)
    made = {**row("a.weight", values), "shape": [2, 3]}
    pq.write_table(pa.Table.from_pylist([made]), tmp_path / "w.parquet")
    with WeightLoader(tmp_path / "w.parquet") as loader:
        assert loader.info("a.weight").dtype == "float64"
        np.testing.assert_array_equal(loader.load("a.weight"), values)


def test_a_group_of_many_rows_is_decoded_once(tmp_path: Path) -> None:
    """Reading weight after weight reads the file about once, not once for each weight."""
    rng = np.random.default_rng(0)
    rows = [row(f"l{i}.weight", rng.normal(size=(64, 64))) for i in range(30)]
    file = write(tmp_path / "w.parquet", rows, V1)
    with WeightLoader(file) as loader:
        for name in loader.names():
            loader.info(name), loader.load(name)
        assert loader.bytes_read < 3 * file.stat().st_size


def test_weights_alone_need_a_config(config: Path, tmp_path: Path) -> None:
    """Without config.json nothing says what model they are of; --config is for them only."""
    file = write(tmp_path / "w.parquet", [row("a.weight", np.ones(2))], V1)
    with pytest.raises(WeightsError, match=r"no config.json.*say --config DIR"):
        convert(file, tmp_path / "bundle")
    with pytest.raises(WeightsError, match="has no config"):
        convert(file, tmp_path / "bundle", config=tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="is for Parquet weights"):
        convert(config, tmp_path / "bundle", config=config)
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(WeightsError, match="Parquet"):
        convert(tmp_path / "no.parquet", tmp_path / "bundle", config=config)


TAKERS = [
    ("m.onnx", "memopt import makes a bundle around"),
    ("m.xml", "memopt import makes a bundle around"),
    ("m.safetensors", "the folder that holds it and config.json"),
    ("m.bin", "can run any code"),
    ("m.txt", "the folder that holds config.json"),
]


@pytest.mark.parametrize(("name", "message"), TAKERS)
def test_a_file_that_is_no_source_names_what_takes_it(
    tmp_path: Path, name: str, message: str
) -> None:
    """As a source, as a bundle, and alone in a folder."""
    file = tmp_path / name
    file.write_bytes(b"x")
    with pytest.raises(WeightsError, match=message):
        convert(file, tmp_path / "bundle")
    # What no tool takes is no model: whoever wants a bundle is told of one.
    there = "the folder that holds memopt.json" if name == "m.txt" else message
    with pytest.raises(BundleError, match=f"is a file, not a bundle folder; .*{there}"):
        open_bundle(file)
    if name == "m.onnx":
        (tmp_path / "config.json").write_text(
            json.dumps({"architectures": ["BertModel"], "model_type": "bert"})
        )
        with pytest.raises(WeightsError, match=f"but {name}; .*{message}"):
            convert(tmp_path, tmp_path / "bundle")


def test_the_command_takes_config(
    weights: dict[str, np.ndarray], config: Path, tmp_path: Path
) -> None:
    """memopt convert weights.parquet --config DIR."""
    file = write(tmp_path / "w.parquet", [row(n, w) for n, w in weights.items()], V1)
    out = str(tmp_path / "bundle")
    arguments = ["convert", str(file), "--config", str(config), "-o", out]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "BertModel, embedding, dimension 32, pooling mean" in result.output
