"""The weight file itself: schemas, bytes, views, damage."""

from __future__ import annotations

import hashlib
import mmap
import threading
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memopt.errors import WeightsError
from memopt.parquetfile import one_line
from memopt.weights import schema
from memopt.weights.quantized import QuantizedWeight
from memopt.weights.reader import WeightLoader
from memopt.weights.writer import write_quantized, write_weights

TINY = {
    "encoder.layer.0.dense.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "encoder.layer.0.dense.bias": np.array([1, -2], np.float16),
    "logit_scale": np.array(2.5, ml_dtypes.bfloat16),
    "position_ids": np.arange(4).reshape(1, 4),
    "empty": np.zeros((0, 3), np.float32),
}
# Of the file these make. When this value has to change, so has the format.
TINY_SHA256 = "a428bfffc545a41e379f4a8a7e9d8dcbe3015ce500fb795f78c45617c6bc5d64"


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test writes its weight file."""
    return tmp_path / "weights.parquet"


def quantized(bits: int = 4, axis: int = 1, group: int = 2) -> QuantizedWeight:
    """A 3 x 5 weight with one scale per block."""
    integers = (np.arange(15).reshape(3, 5) % (1 << (bits - 1))).astype(np.int8)
    shape = () if axis == -1 else ((3, 3) if group else (5,))
    scales = np.linspace(0.5, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    return QuantizedWeight(integers, scales, np.ones(shape, np.int8), axis, group, bits)


def test_bytes_are_golden(path: Path) -> None:
    """The same weights give the same bytes, today and in the next release."""
    write_weights(path, TINY)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == TINY_SHA256


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_every_dtype_comes_back_bit_for_bit(path: Path, compression: str | None) -> None:
    """float32, float16, bfloat16 and int64 in one file keep dtype, shape and bits."""
    write_weights(path, TINY, compression=compression)
    with WeightLoader(path) as loader:
        assert loader.names() == list(TINY)
        assert loader.version == 1
        for name, array in loader.items():
            assert same(array, TINY[name])
            assert loader.info(name).shape == TINY[name].shape
            assert loader.info(name).dtype == TINY[name].dtype.name


def test_other_tools_read_the_same_values(path: Path) -> None:
    """pyarrow, which did not write the file, sees the documented columns and values."""
    write_weights(path, TINY)
    table = pq.read_table(path)
    assert table.schema.remove_metadata() == schema.v1("float32", with_bytes=True)
    row = table.to_pylist()[0]
    assert row["layer_name"] == "encoder.layer.0.dense"
    assert row["weight_name"] == "weight"
    assert row["weight_data"] == [0, 1, 2, 3, 4, 5]
    assert row["shape"] == [2, 3]
    assert table.to_pylist()[2]["weight_bytes"] == TINY["logit_scale"].tobytes()
    stats = pq.ParquetFile(path).metadata.row_group(1).column(1).statistics
    assert (stats.min, stats.max) == ("bias", "bias")


def test_a_long_tensor_spans_pages(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values past the page limit continue in more pages that pyarrow and the loader join."""
    monkeypatch.setattr("memopt.weights.parquet.PAGE_BYTES", 64)
    weight = np.arange(100, dtype=np.float32).reshape(4, 25)
    integers = (np.arange(1200) % 255 - 127).astype(np.int8).reshape(3, 400)
    write_weights(path, {"w": weight})
    assert pq.read_table(path).column("weight_data")[0].as_py() == weight.reshape(-1).tolist()
    assert same(WeightLoader(path).load("w"), weight)
    one = QuantizedWeight(integers, np.float32([1, 1, 1]), np.zeros(0, np.int8), 0, 0, 8)
    write_quantized(path, [("w", one)])
    assert np.array_equal(WeightLoader(path).load_quantized("w").integers, integers)


def test_an_uncompressed_weight_is_a_view_of_the_file(path: Path) -> None:
    """Loading allocates nothing the size of the weight, and values start at 64-byte places."""
    big = np.random.default_rng(0).standard_normal((1000, 1000)).astype(np.float32)
    write_weights(path, {"a.weight": big, "b.weight": big[:7], "c.weight": big.astype(np.float16)})
    loader = WeightLoader(path)
    loader.names()
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    arrays = [loader.load(name) for name in loader.names()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    assert pa.total_allocated_bytes() - arrow < 200_000
    for array in arrays[:2]:
        base = array
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
        assert array.ctypes.data % 64 == 0
        assert not array.flags.writeable
    loader.unload()
    assert same(arrays[0], big)  # a view outlives the loader's own use of the file
    assert same(loader.load("b.weight"), big[:7])  # and the loader opens it again


def test_int8_weights_are_a_view_too(path: Path) -> None:
    """A quantized row's integers are one byte each in the file and are handed out in place."""
    integers = np.random.default_rng(0).integers(-128, 128, (512, 511), np.int8)
    weight = QuantizedWeight(integers, np.ones(512, np.float32), np.zeros(0, np.int8), 0, 0, 8)
    write_quantized(path, [("w", weight)])
    loaded = WeightLoader(path).load_quantized("w")
    assert not loaded.integers.flags.owndata
    assert np.array_equal(loaded.integers, integers)
    assert path.stat().st_size < integers.size + 20_000
    assert pq.read_table(path).column("weight_data")[0].as_py() == integers.reshape(-1).tolist()


def test_one_weight_is_read_without_the_others(minilm_file: Path) -> None:
    """Of the 90 MB MiniLM file, one query matrix costs its own bytes and the footer."""
    with WeightLoader(minilm_file) as loader:
        weight = loader.load("encoder.layer.3.attention.self.query.weight")
        assert weight.nbytes <= loader.bytes_read < weight.nbytes + 200_000
    assert minilm_file.stat().st_size > 90_000_000


def test_describing_weights_reads_no_values(minilm_file: Path) -> None:
    """Shape and dtype of all weights come from the small columns."""
    with WeightLoader(minilm_file) as loader:
        infos = [loader.info(name) for name in loader.names()]
        assert sum(i.size for i in infos) > 22_000_000
        assert loader.bytes_read < 500_000


def test_threads_share_a_loader(path: Path) -> None:
    """Eight threads reading compressed rows at once all get the right values."""
    weights = {f"layer.{i}.weight": np.full((50, 50), i, np.float32) for i in range(40)}
    write_weights(path, weights, compression="zstd")
    loader, wrong = WeightLoader(path), []

    def work() -> None:
        wrong.extend(n for n in loader.names() if not same(loader.load(n), weights[n]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_of_the_four_plain_columns_is_read(path: Path) -> None:
    """Schema V1 by another writer, many rows in one row group and no metadata, is V1 float16."""
    table = pa.table(
        {
            "layer_name": ["a", "b"],
            "weight_name": ["weight", "weight"],
            "weight_data": pa.array([np.float16([1, 2]), np.float16([3])], pa.list_(pa.float16())),
            "shape": pa.array([[2, 1], [1]], pa.list_(pa.int32())),
        }
    )
    pq.write_table(table, path)
    with WeightLoader(path) as loader:
        assert loader.names() == ["a.weight", "b.weight"]
        assert loader.info("a.weight").dtype == "float16"
        assert same(loader.load("a.weight"), np.float16([[1], [2]]))
        assert same(loader.load("b.weight"), np.float16([3]))


@pytest.mark.parametrize(("bits", "axis", "group"), [(8, -1, 0), (4, 1, 0), (4, 1, 2), (2, 1, 2)])
def test_quantized_weights_come_back(path: Path, bits: int, axis: int, group: int) -> None:
    """V2 keeps integers, scales, zero points, axis and group, and dequantizes by the formula."""
    weight = quantized(bits, axis, group)
    write_quantized(path, [("a.weight", weight)])
    with WeightLoader(path) as loader:
        assert loader.version == 2
        back = loader.load_quantized("a.weight")
        assert np.array_equal(back.integers, weight.integers)
        assert np.array_equal(back.scales, weight.scales)
        assert np.array_equal(back.zero_points, weight.zero_points)
        assert (back.axis, back.group_size, back.bits) == (axis, group, bits)
        column = np.arange(5) // 2 if group else np.arange(5)
        scale = weight.scales if axis == -1 else weight.scales[..., column]
        expected = scale * (weight.integers.astype(np.float32) - 1)
        assert np.array_equal(loader.load("a.weight"), expected.astype(np.float32))


def test_kept_rows_of_a_quantized_file(path: Path) -> None:
    """Layers left in float are float16; what float16 cannot hold is kept bit for bit."""
    large = np.float32([1e6, 1.0])
    ids = np.arange(5000)
    write_quantized(path, [("norm", np.float32([0.1, 2])), ("large", large), ("ids", ids)])
    with WeightLoader(path) as loader:
        assert same(loader.load("norm"), np.float16([0.1, 2]))
        assert same(loader.load("large"), large)
        assert same(loader.load("ids"), ids)
        assert loader.info("ids").quant_type == "raw"
        with pytest.raises(WeightsError, match="'norm' is kept as fp16"):
            loader.load_quantized("norm")


def edit(path: Path, **columns: pa.Array) -> None:
    """Rewrite a weight file with other values in some columns, metadata kept."""
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, path)


def test_damage_is_named(path: Path) -> None:
    """Row, name and values are in the message of every inconsistent row."""
    ints, floats, bytes_ = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.int8())
    write_weights(path, {"a.weight": np.ones((2, 3), np.float32)})
    edit(path, shape=pa.array([[2, 4]], ints))
    with pytest.raises(WeightsError, match=r"row 0 \(a\.weight\): 6 values, shape \[2, 4\]"):
        WeightLoader(path).load("a.weight")
    edit(path, shape=pa.array([[2, -3]], ints))
    with pytest.raises(WeightsError, match=r"shape \[2, -3\] is not a shape"):
        WeightLoader(path).info("a.weight")
    for column, values, message in (
        ("scales", pa.array([[1.0, 2.0]], floats), r"2 scales, shape \[3, 5\].*needs 9"),
        ("scales", pa.array([[np.nan] * 9], floats), "a scale is nan"),
        ("zero_points", pa.array([[1]], bytes_), "1 zero points for 9 scales"),
        ("weight_data", pa.array([[1, 2]], bytes_), r"2 bytes, shape \[3, 5\] needs 8"),
        ("quant_axis", pa.array([7], pa.int32()), "quant_axis 7 does not exist"),
        ("quant_type", pa.array(["int3"]), "quant_type 'int3' is not known"),
    ):
        write_quantized(path, [("a.weight", quantized())])
        edit(path, **{column: values})
        with pytest.raises(WeightsError, match=rf"row 0 \(a\.weight\).*{message}"):
            WeightLoader(path).load("a.weight")


@pytest.mark.parametrize(
    "said",
    [
        pa.ArrowMemoryError("malloc of size 64 failed"),
        pa.ArrowException("Failed to launch worker thread: Resource temporarily unavailable"),
    ],
)
def test_too_little_memory_is_no_damage(said: Exception, path: Path) -> None:
    """A whole file need not be made again."""
    with pytest.raises(WeightsError, match="free memory"), one_line(path, WeightsError):
        raise said


def test_a_wrong_file_is_refused(path: Path) -> None:
    """Truncation, missing columns, wrong types and lying metadata each give one line."""
    write_weights(path, {"a.weight": np.ones((2, 3), np.float32)})
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match="not a readable Parquet file"):
            WeightLoader(path).names()
    path.write_bytes(whole)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["shape"]), path)
    with pytest.raises(WeightsError, match="has no column 'shape'"):
        WeightLoader(path).names()
    wrong = table.set_column(3, "shape", pa.array(["2x3"]))
    pq.write_table(wrong, path)
    with pytest.raises(WeightsError, match="'shape' has type string"):
        WeightLoader(path).names()
    pq.write_table(table.replace_schema_metadata({"memopt.schema_version": "2"}), path)
    with pytest.raises(WeightsError, match="says schema V2, the columns are schema V1"):
        WeightLoader(path).names()
    with pytest.raises(WeightsError, match="no weight file"):
        WeightLoader(path.with_name("none.parquet")).names()


def test_an_unknown_weight_names_the_nearest(path: Path) -> None:
    """A typo in a weight's name is answered with the name meant."""
    write_weights(path, TINY)
    with pytest.raises(WeightsError, match="did you mean 'logit_scale'"):
        WeightLoader(path).load("logit_scal")


def test_a_failing_write_leaves_the_old_file(path: Path) -> None:
    """An error in the middle of a stream keeps the file that was there, and nothing beside it."""
    write_weights(path, TINY)
    before = path.read_bytes()
    with pytest.raises(WeightsError, match="given twice"):
        write_weights(path, iter([("a", np.ones(2, np.float32))] * 2), dtypes={"a": ("float32", 8)})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
