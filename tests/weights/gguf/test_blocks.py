"""Every number type gives what llama.cpp's own package gives, bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.errors import WeightsError
from memopt.weights.gguf.blocks import integers, values
from memopt.weights.gguf.file import GgufTensor
from memopt.weights.gguf.kinds import KINDS, BlockKind, block_kind

ROWS = 6


def tensor(folder: Path, kind: BlockKind, seed: int) -> tuple[GgufTensor, np.ndarray]:
    """Return a tensor of random bytes, and the bytes a row each."""
    raw = np.random.default_rng(seed).integers(0, 256, (ROWS, 4 * kind.size), np.uint8)
    path = folder / f"{kind.name}-{seed}"
    path.write_bytes(raw.tobytes())
    return GgufTensor("w", kind, (ROWS, 4 * kind.values), path, 0), raw


@pytest.mark.parametrize("number", KINDS)
@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=20, deadline=None)
def test_values_are_those_of_the_gguf_package(
    number: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Random bytes, infinite scales among them, become the same float32."""
    stored, raw = tensor(tmp_path_factory.mktemp("blocks"), KINDS[number], seed)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(number))
    actual = values(stored).astype(np.float32)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), ~numbers)
    bits = actual[numbers].view(np.uint32), expected[numbers].view(np.uint32)
    np.testing.assert_array_equal(*bits)


@pytest.mark.parametrize("kind", [k for k in KINDS.values() if k.quantized], ids=lambda k: k.name)
def test_quantized_rows_stand_for_the_same_values(kind: BlockKind, tmp_path: Path) -> None:
    """Stored as schema V2's signed integers with zero points and minima, no bit changes."""
    weights = np.random.default_rng(1).standard_normal((ROWS, 512), np.float32)
    number = next(n for n, k in KINDS.items() if k is kind)
    path = tmp_path / "w"
    if kind.name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):  # the package cannot write these
        stored, raw = tensor(tmp_path, kind, 0)
        path, halves = stored.path, raw.reshape(-1, kind.size)
        # Scales of random bytes: finite ones in their place.
        for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind.name, (0, 2)):
            halves[:, at : at + 2] = np.full((len(halves), 1), 0.01, np.float16).view(np.uint8)
        path.write_bytes(raw.tobytes())
    else:
        raw = gguf.quants.quantize(weights, gguf.GGMLQuantizationType(number))
        path.write_bytes(raw.tobytes())
        stored = GgufTensor("w", kind, weights.shape, path, 0)
    weight = integers(stored).weight()
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(number))
    np.testing.assert_array_equal(weight.dequantize(), expected)
    assert (weight.bits, weight.group_size) == (kind.bits, kind.group)


def test_a_part_is_a_slice_of_the_first_axis(tmp_path: Path) -> None:
    """An expert is read without the others."""
    stored, _ = tensor(tmp_path, KINDS[8], 3)
    cube = GgufTensor("w", KINDS[8], (3, 2, 128), stored.path, 0)
    for part in range(3):
        np.testing.assert_array_equal(values(cube, part), values(cube)[part])


@pytest.mark.parametrize(
    ("number", "said"), [(20, "IQ4_NL"), (39, "MXFP4"), (26, "I32"), (99, "of type 99")]
)
def test_other_types_are_refused_by_name(number: int, said: str) -> None:
    """The message names the tensor and its type, and lists what is read."""
    with pytest.raises(WeightsError, match=rf"'blk\.0\.w' is {said}.*Q4_1"):
        block_kind(number, "blk.0.w")
