"""Weight files for any shape and dtype; packing for any length."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from memopt.weights.packing import RANGES, pack, packed_length, unpack
from memopt.weights.quantized import QuantizedWeight, scale_shape
from memopt.weights.reader import WeightLoader
from memopt.weights.schema import join_name, split_name
from memopt.weights.writer import write_quantized, write_weights

DTYPES = ["<f2", "<f4", "<f8", "<i8", "<i4", "|i1", "|u1", "|b1", "bfloat16"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Arrays with any bits (NaN payloads, denormals), scalars and empty ones included."""
    kind = draw(st.sampled_from(DTYPES))
    dtype = np.dtype(ml_dtypes.bfloat16) if kind == "bfloat16" else np.dtype(kind)
    shape = draw(SHAPES)
    count = int(np.prod(shape))
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    data = np.frombuffer(raw, np.uint8).copy()
    return (data & 1 if kind == "|b1" else data).view(dtype).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.dictionaries(NAMES, arrays(), min_size=1, max_size=5),
    compression=st.sampled_from([None, "zstd"]),
)
def test_weights_round_trip(
    tmp_path_factory: object, weights: dict[str, np.ndarray], compression: str | None
) -> None:
    """Any dtypes, shapes and names in one file come back bit for bit, detected as V1."""
    path = tmp_path_factory.mktemp("w") / "w.parquet"  # type: ignore[attr-defined]
    write_weights(path, weights, compression=compression)
    first = path.read_bytes()
    write_weights(path, weights, compression=compression)
    assert path.read_bytes() == first
    with WeightLoader(path) as loader:
        assert loader.version == 1
        assert loader.names() == list(weights)
        for name, array in loader.items():
            assert array.dtype == weights[name].dtype
            assert array.shape == weights[name].shape
            assert array.tobytes() == weights[name].tobytes()


@given(NAMES)
@example("0.")
def test_names_split_and_join(name: str) -> None:
    """Every checkpoint name is two columns and itself again."""
    assert join_name(*split_name(name)) == name


@given(st.sampled_from([8, 4, 2]), st.data())
def test_packing_round_trips(bits: int, data: st.DataObject) -> None:
    """Any length, divisible by 4 or not, packs into ceil(n * bits / 8) bytes and back."""
    low, high = RANGES[bits]
    values = np.array(data.draw(st.lists(st.integers(low, high), max_size=40)), np.int8)
    packed = pack(values, bits)
    assert packed.size == packed_length(values.size, bits)
    assert np.array_equal(unpack(packed, values.size, bits), values)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([8, 4, 2]), st.data())
def test_quantized_files_round_trip(
    tmp_path_factory: object, bits: int, data: st.DataObject
) -> None:
    """Any shape, axis and group size is detected as V2 and read back integer for integer."""
    shape = data.draw(SHAPES)
    axis = data.draw(st.integers(-1, len(shape) - 1))
    group = data.draw(st.integers(0, 9)) if axis >= 0 else 0
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    low, high = RANGES[bits]
    places = scale_shape(shape, axis, group)
    weight = QuantizedWeight(
        rng.integers(low, high + 1, shape, np.int8),
        rng.random(places).astype(np.float32).reshape(places),
        rng.integers(low, high + 1, places, np.int8).reshape(places),
        axis,
        group,
        bits,
    )
    path: Path = tmp_path_factory.mktemp("q") / "q.parquet"  # type: ignore[attr-defined]
    write_quantized(path, [("a.weight", weight)])
    with WeightLoader(path) as loader:
        back = loader.load_quantized("a.weight")
        assert loader.version == 2
        assert np.array_equal(back.integers, weight.integers)
        assert np.array_equal(back.scales, weight.scales)
        assert np.array_equal(back.dequantize(), weight.dequantize())
