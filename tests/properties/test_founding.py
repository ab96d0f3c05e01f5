"""The six correctness properties of the founding design, against torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from memopt import ArrowEngine
from memopt.bundle import Bundle
from memopt.federation.delta.compute import apply_delta, compute_delta
from memopt.federation.delta.settings import DeltaSettings
from memopt.memory.graph.association import AssociationGraph
from memopt.memory.graph.retriever import MultimodalRetriever
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from memopt.quantization.arrow import ArrowQuantizer
from memopt.weights.reader import WeightLoader
from memopt.weights.writer import write_weights
from tests.memory.kit import png, wav

pytestmark = pytest.mark.property

MATRICES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=24),
    elements=st.floats(-10, 10, width=32),
)
DIM = 8
# A store of its own for each example: tens of milliseconds, so few of them.
STORES = settings(max_examples=8)


@pytest.fixture(scope="module")
def engines(minilm: Bundle) -> Iterator[tuple[ArrowEngine, ArrowEngine]]:
    """The optimized graph, and torch on the same weights."""
    with ArrowEngine(minilm, "cpu") as fast, ArrowEngine(minilm, "torch") as slow:
        yield fast, slow


@given(st.text(min_size=1, max_size=500))
def test_1_optimization_keeps_the_vector(
    engines: tuple[ArrowEngine, ArrowEngine], text: str
) -> None:
    """For any text the optimized vector has a cosine above .99 to torch's."""
    text = text.encode("utf-8", "replace").decode()
    fast, slow = (torch.from_numpy(engine.encode(text)) for engine in engines)
    assert float(torch.nn.functional.cosine_similarity(fast, slow, dim=0)) > 0.99


@given(MATRICES, st.sampled_from([8, 4, 2]), st.booleans(), st.sampled_from([0, -1]))
def test_2_quantized_weights_are_detected_and_dequantized(
    tmp_path_factory: pytest.TempPathFactory,
    weight: np.ndarray,
    bits: int,
    symmetric: bool,
    axis: int,
) -> None:
    """What is loaded is torch's own (q - zero point) x scale, within a step of the weight."""
    folder = tmp_path_factory.mktemp("v2")
    write_weights(folder / "v1.parquet", {"a.weight": weight})
    quantizer = ArrowQuantizer(bits=bits, symmetric=symmetric, axis=axis)
    quantizer.quantize(folder / "v1.parquet", folder / "v2.parquet")
    with WeightLoader(folder / "v2.parquet") as loader:
        assert loader.version == 2
        found = torch.from_numpy(loader.load("a.weight").copy())
        stored = loader.load_quantized("a.weight")
    points = stored.zero_points if stored.zero_points.size else np.zeros(1, np.int8)
    shape = (-1, 1) if axis == 0 else (1, 1)
    scales = torch.from_numpy(stored.scales.copy()).reshape(shape)
    values = torch.from_numpy(stored.integers.copy()).int()
    zero = torch.from_numpy(points.copy()).int()
    again = (values - (zero.reshape(shape) if zero.numel() > 1 else zero)).float() * scales
    assert found.shape == weight.shape
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, again)
    assert ((found - torch.from_numpy(weight)).abs() <= scales * 1.01 + 1e-6).all()


def _asked_by(folder: Path, modality: str, seed: int) -> set[str]:
    """What a query of one modality brings back of memories that happened together."""
    rng = np.random.default_rng(seed)
    kinds = {"text": "words", "vision": png(seed), "audio": wav(seed)}
    vectors = {name: rng.normal(size=DIM) for name in kinds}
    with MemoryStore(folder, dim=DIM, background=False) as store:
        graph = AssociationGraph(store)
        together = [
            NewMemory(content=Content(**{name: kinds[name]}), embedding=vectors[name])  # type: ignore[arg-type]
            for name in kinds
        ]
        ids = dict(zip(kinds, store.add(together).ids, strict=True))
        found = MultimodalRetriever(store, graph).retrieve(vector=vectors[modality], top_k=10)
        reached = {result.memory.memory_id for result in found}
        return {name for name, key in ids.items() if key in reached}


@STORES
@given(st.integers(0, 2**31))
def test_3_a_picture_brings_words_or_a_sound(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Whatever was seen, what was heard or read with it comes back."""
    assert _asked_by(tmp_path_factory.mktemp("s"), "vision", seed) & {"text", "audio"}


@STORES
@given(st.integers(0, 2**31))
def test_4_a_sound_brings_words_or_a_picture(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Whatever was heard, what was seen or read with it comes back."""
    assert _asked_by(tmp_path_factory.mktemp("s"), "audio", seed) & {"text", "vision"}


@given(MATRICES, st.floats(0, 1, width=32), st.sampled_from(["float32", "float16", "float64"]))
def test_5_a_delta_there_and_back_gives_the_new_weights(
    old: np.ndarray, share: float, dtype: str
) -> None:
    """Lossless: bit for bit; int8: exactly what the sender says the receiver gets."""
    old = old.astype(dtype)
    new = {"w": (old * (1 + share)).astype(dtype), "added": old}
    for codec in ("lossless", "int8"):
        delta = compute_delta({"w": old}, new, DeltaSettings(codec=codec, delta_threshold=0))
        got = apply_delta({"w": old}, delta.payload)
        for name, promised in (new if codec == "lossless" else delta.received).items():
            assert torch.equal(torch.from_numpy(got[name]), torch.from_numpy(promised))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(MATRICES, st.sampled_from([0, 8, 4, 2]))
def test_6_the_schema_is_detected(
    tmp_path_factory: pytest.TempPathFactory, weight: np.ndarray, bits: int
) -> None:
    """V1 gives the weight as it was stored, V2 a float32 weight; the columns say which it is."""
    folder = tmp_path_factory.mktemp("schema")
    file = folder / "v1.parquet"
    write_weights(file, {"a.weight": weight})
    if bits:
        ArrowQuantizer(bits=bits).quantize(file, folder / "v2.parquet")
        file = folder / "v2.parquet"
    with WeightLoader(file) as loader:
        found = torch.from_numpy(loader.load("a.weight").copy())
        assert loader.version == (2 if bits else 1)
    assert found.dtype == torch.float32
    assert bits or torch.equal(found, torch.from_numpy(weight))
