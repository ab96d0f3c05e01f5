"""Schema V2.1: quantized rows with minima beside the scales, and what V2 says of such files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from memopt.errors import WeightsError
from memopt.weights import schema
from memopt.weights.quantized import QuantizedWeight
from memopt.weights.reader import WeightLoader
from memopt.weights.writer import write_quantized

NONE = np.zeros(0, np.float32)


def weight(axis: int, group: int, *, minima: bool = True) -> QuantizedWeight:
    """Return a 4-bit weight of random integers; groups of ``group`` along ``axis``."""
    rng = np.random.default_rng(axis * 100 + group)
    places = {(0, 0): (6,), (1, 32): (6, 2), (0, 3): (2, 64)}[axis, group]
    return QuantizedWeight(
        rng.integers(-8, 8, (6, 64), np.int8),
        rng.uniform(0.01, 1, places).astype(np.float32),
        np.full(places, -8, np.int8),
        axis,
        group,
        4,
        rng.standard_normal(places).astype(np.float32) if minima else NONE,
    )


@pytest.mark.parametrize(("axis", "group"), [(0, 0), (1, 32), (0, 3)])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_minima_come_back(axis: int, group: int, compression: str | None, tmp_path: Path) -> None:
    """A weight is the same after it was stored, beside one without minima and exact floats."""
    stored, plain = weight(axis, group), weight(axis, group, minima=False)
    floats = np.array([1 / 3, 1e-30], np.float32)
    rows = [("a.weight", stored), ("b.weight", plain), ("c", floats)]
    path = tmp_path / "w.parquet"
    write_quantized(path, rows, minima=True, exact=True, compression=compression)
    with WeightLoader(path) as loader:
        assert loader.version == 2
        loaded = loader.load_quantized("a.weight")
        np.testing.assert_array_equal(loaded.minima, stored.minima)
        np.testing.assert_array_equal(loader.load("a.weight"), stored.dequantize())
        assert not loader.load_quantized("b.weight").has_minima
        np.testing.assert_array_equal(loader.load("b.weight"), plain.dequantize())
        np.testing.assert_array_equal(loader.load("c"), floats)


def test_a_value_is_scale_times_steps_plus_minimum() -> None:
    """By hand: 0.5 * (integer + 8) - 1, transposed and in another order of rows too."""
    rows = np.array([[-8, -7, 7]], np.int8).repeat(2, 0)
    rows[1, 0] = 0
    scales, points = np.full(2, 0.5, np.float32), np.full(2, -8, np.int8)
    q = QuantizedWeight(rows, scales, points, 0, 0, 4, np.array([-1, 10], np.float32))
    expected = [[-1, -0.5, 6.5], [14, 10.5, 17.5]]
    assert q.dequantize().tolist() == expected
    assert q.transposed().dequantize().T.tolist() == expected
    assert q.rows(np.array([1, 0])).dequantize().tolist() == expected[::-1]
    with pytest.raises(WeightsError, match="rows of 3 share a scale"):
        weight(0, 3).rows(np.arange(6))


def test_a_plain_v2_file_has_no_such_column(tmp_path: Path) -> None:
    """What was written before is written the same way, and minima have no place in it."""
    path = tmp_path / "w.parquet"
    write_quantized(path, [("b.weight", weight(1, 32, minima=False))])
    assert pq.read_schema(path).names == schema.V2.names
    assert pq.read_schema(path).metadata[b"memopt.schema_version"] == b"2"
    with pytest.raises(WeightsError, match=r"'a\.weight' has minima, which schema V2 does not"):
        write_quantized(path, [("a.weight", weight(1, 32))])


def test_the_version_tells_files_with_minima_apart(tmp_path: Path) -> None:
    """A memopt that knows V2 alone compares the version with its columns, and refuses the file."""
    path = tmp_path / "w.parquet"
    write_quantized(path, [("a.weight", weight(1, 32))], minima=True)
    table = pq.read_table(path)
    assert table.schema.metadata[b"memopt.schema_version"] == b"2.1"
    pq.write_table(table.drop(["minima"]), path)
    with pytest.raises(WeightsError, match=r"says schema V2\.1, the columns are schema V2"):
        WeightLoader(path).names()
    pq.write_table(table.replace_schema_metadata({"memopt.schema_version": "2"}), path)
    with pytest.raises(WeightsError, match=r"says schema V2, the columns are schema V2\.1"):
        WeightLoader(path).names()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_minima_that_are_no_numbers_are_refused(value: float) -> None:
    """As scales are."""
    q = weight(0, 0)
    minima = q.minima.copy()
    minima[3] = value
    with pytest.raises(WeightsError, match=f"a minimum is {value}"):
        QuantizedWeight(q.integers, q.scales, q.zero_points, 0, 0, 4, minima)
    with pytest.raises(WeightsError, match="5 minima for 6 scales"):
        QuantizedWeight(q.integers, q.scales, q.zero_points, 0, 0, 4, minima[:5])
