"""The founding design's names do what its examples do with them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from memopt import compat
from memopt.bundle import Bundle, open_bundle
from memopt.errors import ConfigurationError, DeviceError, InputError, WeightsError
from memopt.exporters.base import export
from memopt.joint.layer import JointConfig, JointEmbeddingLayer
from memopt.runtimes.testing import fake_engine
from memopt.weights.reader import WeightLoader
from memopt.weights.writer import write_weights

TEXTS = ["a cat", "the dog", "a cat and the dog", "dog"]
YAML = """\
device: {target: cpu, fallback_enabled: true, vram_threshold: 0.9}
cpu: {use_compile: true, use_ipex: true, compile_mode: default}
quantization: {enabled: false, quant_type: int8, calibration_method: ptq, per_channel: true}
consolidation: {llm_provider: claude, keep_original: false, pressure_threshold_mb: 1000.0}
federation: {enable_delta_sync: true, timeout_seconds: 30}
"""


@pytest.fixture(scope="module")
def model(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with its portable graph; the tests add graphs to it."""
    folder = tmp_path_factory.mktemp("compat") / "tiny"
    shutil.copytree(tiny.path, folder)
    export(open_bundle(folder), format="onnx", fused=False)
    return folder


@pytest.fixture(scope="module")
def quantized(model: Path) -> Path:
    """int8 weights beside it, by the command of the founding design's migration guide."""
    output = model / "weights_int8.parquet"
    command = [sys.executable, "-m", "memopt.tools.quantize", "--input"]
    command += [str(model / "weights.parquet"), "--output", str(output)]
    done = subprocess.run(
        [*command, "--quant-type", "int8", "--calibration", "ptq"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return output


def test_every_name_is_there() -> None:
    """All that the package lists can be imported from it."""
    for name in compat.__all__:
        assert getattr(compat, name)
    with pytest.raises(AttributeError, match="no attribute 'Arow'"):
        compat.Arow  # noqa: B018


@pytest.mark.integration
def test_quantize_validate_and_encode(model: Path, quantized: Path) -> None:
    """The whole way: V2 file, proof against the original, an engine over the file itself."""
    result = compat.PrecisionValidator(cosine_threshold=0.95).validate(
        model / "weights.parquet", quantized, TEXTS
    )
    assert result.passed, result.error_message
    assert result.cosine_similarity >= 0.95
    strict = compat.PrecisionValidator(cosine_threshold=1.1).validate(
        model / "weights.parquet", quantized, TEXTS
    )
    assert not strict.passed
    assert "is below 1.1" in str(strict.error_message)
    with compat.ArrowEngine(quantized) as engine:
        assert engine.encode(TEXTS).shape == (len(TEXTS), 32)
        assert engine.device_info()["variant"] == "onnx-int8-arrow"


def test_an_engine_of_a_folder_optimized_or_not(model: Path) -> None:
    """optimize=False is the plain float graph; a bare text gives its vector; both agree."""
    with compat.ArrowEngine(model, device="cpu", optimize=False) as plain:
        assert plain.device_info()["variant"] == "onnx-fp32"
        expected = plain.encode("a cat", normalize=True)
    with compat.ArrowEngine(model / "weights.parquet", device="cpu", optimize=True) as fast:
        found = fast.encode("a cat", normalize=True)
    assert expected.shape == (32,)
    assert float(expected @ found) > 0.99


def test_a_weight_file_alone_says_what_it_lacks(model: Path, tmp_path: Path) -> None:
    """Neither a file outside of a bundle nor other float weights inside run by guess."""
    lonely = tmp_path / "weights.parquet"
    shutil.copy(model / "weights.parquet", lonely)
    with pytest.raises(WeightsError, match="memopt convert"):
        compat.ArrowEngine(lonely)
    other = model / "other.parquet"
    shutil.copy(model / "weights.parquet", other)
    with pytest.raises(WeightsError, match="not the float weights"):
        compat.ArrowEngine(other)


def test_one_weight_as_a_tensor(model: Path, quantized: Path) -> None:
    """Version by the columns; V2 is dequantized; an unknown name is a KeyError."""
    layer, weight = "encoder.layer.0.attention.self.query", "weight"
    first = compat.WeightLoaderV2(model / "weights.parquet")
    second = compat.WeightLoaderV2(quantized)
    assert (first.schema_version, second.schema_version) == (1, 2)
    original, found = (loader.load_weight(layer, weight) for loader in (first, second))
    assert isinstance(found, torch.Tensor)
    assert original.shape == found.shape
    assert float((original - found).abs().max()) <= float(original.abs().max()) / 127
    with pytest.raises(KeyError, match="no weight"):
        first.load_weight(layer, "wieght")
    second.unload_unused_weights()
    assert torch.equal(second.load_weight(layer, weight), found)


def test_bfloat16_becomes_a_tensor_bit_for_bit(tmp_path: Path) -> None:
    """numpy has no bfloat16 of its own; torch has."""
    import ml_dtypes

    values = np.array([[1.5, -2.25], [3e38, 0]], ml_dtypes.bfloat16)
    write_weights(tmp_path / "w.parquet", {"a.weight": values})
    found = compat.WeightLoaderV2(tmp_path / "w.parquet").load_weight("a", "weight")
    assert found.dtype == torch.bfloat16
    assert found.float().tolist() == values.astype(np.float32).tolist()


def test_mixed_precision_fp16_and_gptq(model: Path, tmp_path: Path) -> None:
    """Named layers stay float16, fp16 keeps all, gptq calibrates with texts and needs them."""
    source, output = model / "weights.parquet", tmp_path / "o.parquet"
    config = compat.QuantizationConfig(quant_type="int2", mixed_precision_layers=["embeddings"])
    report = compat.ArrowQuantizer(config).quantize_model(source, output)
    kinds = {layer.name: layer.kind for layer in report.layers if layer.matrix}
    assert {kinds[name] for name in kinds if "embeddings" in name} == {"kept"}
    assert "rtn" in kinds.values()
    fp16 = compat.ArrowQuantizer(compat.QuantizationConfig(quant_type="fp16"))
    assert not fp16.quantize_model(source, output).quantized
    gptq = compat.ArrowQuantizer(compat.QuantizationConfig(calibration_method="gptq"))
    with pytest.raises(compat.weights.arrow.QuantizationError, match="calibration"):
        gptq.quantize_model(source, output)
    made = gptq.quantize_model(source, output, TEXTS)
    assert any(layer.kind == "gptq" for layer in made.layers)
    for wrong in ({"quant_type": "int3"}, {"calibration_method": "best"}):
        with pytest.raises(ConfigurationError):
            compat.QuantizationConfig(**wrong)


def test_the_tool_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 1, and no file."""
    from memopt.tools.quantize import main

    output = tmp_path / "o.parquet"
    assert main(["--input", str(tmp_path / "none.parquet"), "--output", str(output)]) == 1
    assert capsys.readouterr().err.startswith("error: no weight file")
    assert not output.exists()


def test_backends_take_a_torch_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any CPU initialises, without IPEX too; a model runs; a GPU that is not there is named."""
    for mode in ("default", "reduce-overhead", "max-autotune"):
        backend = compat.CPUBackend(config={"compile_mode": mode})
        assert backend.compile_mode == mode
    assert isinstance(backend.has_avx512, bool)
    assert backend.get_device_info()["backend"] == "CPUBackend"

    class Sum(torch.nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return (ids * mask).sum(1, keepdim=True)

    plain = compat.CPUBackend(config={"use_compile": False})
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(DeviceError, match="optimize_model"):
        plain.forward(ids, ids)
    plain.optimize_model(Sum())
    assert plain.forward(ids, torch.tensor([[1, 1, 0]])).tolist() == [[3]]
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cuda is not available"):
            compat.GPUBackend()
        assert compat.CPUBackend("auto").device in ("cpu", "mps")


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JointEmbeddingLayer]:
    """A small joint layer, trained for one epoch on noise: enough to be a function."""
    from memopt.joint.bundle import make_joint_bundle
    from memopt.joint.pairs import make_pairs
    from memopt.joint.train import JointRecipe

    config = JointConfig(vision=20, audio=16, text=12, joint=32, hidden=48, heads=4)
    rng = np.random.default_rng(0)
    vectors = {name: rng.normal(size=(64, width)) for name, width in config.dims.items()}
    pairs = make_pairs(vectors, group=np.arange(64) % 8)
    folder = tmp_path_factory.mktemp("joint") / "layer"
    recipe = JointRecipe(epochs=1, batch_size=32)
    with JointEmbeddingLayer(make_joint_bundle(pairs, folder, config=config, recipe=recipe)) as it:
        yield it


@pytest.mark.integration
def test_a_memory_is_found_by_any_of_its_modalities(
    layer: JointEmbeddingLayer, tmp_path: Path
) -> None:
    """Stored with vectors and words, found by the vision vector, the audio vector, the words."""
    rng = np.random.default_rng(1)
    vision, audio = rng.normal(size=20).astype("f4"), rng.normal(size=16).astype("f4")
    engine = fake_engine(12)
    found = compat.MultimodalRetriever(tmp_path / "s", layer, encoders={"text": engine})
    text = "A cat is playing with a ball"
    key = asyncio.run(found.store_memory(vision_emb=vision, audio_emb=audio, text=text))
    asyncio.run(found.store_memory(audio_emb=-audio, text="Rain"))
    for query in ({"query_vision": vision}, {"query_audio": audio}, {"query_text": text}):
        results = found.retrieve(**query, top_k=5)
        assert key in [result.memory.memory_id for result in results]
    assert 0 <= results[0].final_score <= 1
    with pytest.raises(InputError, match="no encoder of it"):
        found.retrieve(query_vision=b"bytes of a picture")
    with pytest.raises(InputError, match="no query"):
        found.retrieve()
    with pytest.raises(InputError, match="shape"):
        found.retrieve(query_vision=audio)
    found.build_association_graph()
    found.close()


def test_bytes_are_encoded_where_there_is_an_encoder(
    layer: JointEmbeddingLayer, tmp_path: Path
) -> None:
    """A picture is asked for by its bytes, and stored with them."""
    from tests.memory.kit import png

    encoders = {"vision": fake_engine(20, "image")}
    found = compat.MultimodalRetriever(tmp_path / "s", layer, encoders=encoders)
    key = asyncio.run(found.store_memory(vision_data=png(1)))
    assert found.retrieve(query_vision=png(1))[0].memory.memory_id == key
    found.close()


def test_ranking_prefers_what_was_used_and_what_it_is_about() -> None:
    """The weights of recency and of words decide; times without a zone count as UTC."""
    now = datetime(2026, 5, 1, tzinfo=UTC)
    stats = [
        compat.MemoryStats(name, 1, now - timedelta(days=days), now)
        for name, days in (("a", 3), ("b", 0), ("c", 9))
    ]
    words = {"a": "a red door", "b": "a blue lake", "c": "a blue lake"}
    recent = compat.HotColdTiering(alpha=1, beta=0).rank_memories(stats, words)
    assert [memory.memory_id for memory, _ in recent] == ["b", "a", "c"]
    assert compat.HotColdTiering().rank_memories([], {}) == []
    naive = dataclasses.replace(stats[2], last_access=datetime(2027, 1, 1))
    assert compat.HotColdTiering().rank_memories([*stats[:2], naive], words)[0][0] is naive


def test_consolidation_starts_and_stops_in_the_background(tmp_path: Path) -> None:
    """As the migration guide starts it: config and folder, and the loop goes on meanwhile."""
    from memopt.memory.memory_store import MemoryStore

    MemoryStore(tmp_path / "s", dim=4).close()
    config = compat.ConsolidationConfig(hot_memory_threshold=20, keep_original=False)

    async def live() -> int:
        worker = compat.ConsolidationWorker(config, tmp_path / "s")
        await worker.start()
        await worker.stop()
        report = await worker.consolidate()
        worker.store.close()
        return report.plan.scanned

    assert asyncio.run(live()) == 0


def test_settings_as_the_founding_file_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read, overruled by the environment, checked, saved and read again; memopt reads it too."""
    path = tmp_path / "optimization_config.yaml"
    path.write_text(YAML)
    config = compat.OptimizationConfig.from_yaml(path)
    assert config.device_target == "cpu"
    assert config.quantization_calibration_method == "ptq"
    monkeypatch.setenv("OPTIMIZATION_DEVICE", "openvino")
    monkeypatch.setenv("OPTIMIZATION_QUANTIZATION_ENABLED", "true")
    config.apply_env_overrides()
    assert (config.device_target, config.quantization_enabled) == ("openvino", True)
    config.validate()
    config.save(tmp_path / "saved.yaml")
    assert compat.OptimizationConfig.from_yaml(tmp_path / "saved.yaml") == config
    assert config.settings().consolidation.language_model() == "anthropic"
    command = [sys.executable, "-m", "memopt", "config", "check", "-f", str(path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("values", "word"),
    [({"device_target": "npu"}, "npu"), ({"device_vram_threshold": 2}, "vram_threshold")],
)
def test_wrong_settings_are_named(values: dict[str, object], word: str) -> None:
    """validate() says which, and an unknown name is refused at once."""
    with pytest.raises(ConfigurationError, match=word):
        compat.OptimizationConfig(**values).validate()
    with pytest.raises(ConfigurationError, match="did you mean 'device_target'"):
        compat.OptimizationConfig(device_targt="cpu")


def test_a_file_that_is_not_there_gives_the_founding_defaults(tmp_path: Path) -> None:
    """ollama writes, originals are dropped, nothing is quantized: as the document says."""
    config = compat.OptimizationConfig.from_yaml(tmp_path / "none.yaml")
    assert config == compat.OptimizationConfig()
    assert config.to_dict()["consolidation_llm_provider"] == "ollama"
    assert not config.quantization_enabled
    config.validate()
    (tmp_path / "bad.yaml").write_text("device: cpu\n")
    with pytest.raises(ConfigurationError, match="not a section"):
        compat.OptimizationConfig.from_yaml(tmp_path / "bad.yaml")


@pytest.mark.integration
def test_weights_are_synchronised(tmp_path: Path) -> None:
    """First everything, then what changed; an address that is none is refused."""
    from memopt.federation.server.server import SyncServer
    from memopt.federation.trust.nodes import Trust, add_trusted
    from memopt.federation.trust.signing import SigningKey

    for node, roles in (("alice", ("push", "pull")), ("server", ("push",))):
        key = SigningKey.generate()
        key.save(tmp_path / f"{node}.sign.key")
        add_trusted(tmp_path / "trust.json", node, key=key.public(), roles=roles)
    trust = Trust(path=tmp_path / "trust.json")
    rng = np.random.default_rng(0)
    old = {f"layer{i}.lora": rng.normal(size=(64, 64)).astype("f4") for i in range(4)}
    with SyncServer(tmp_path / "store", trust=trust, key=key) as server:
        manager = compat.DeltaSyncManager(
            compat.DeltaSyncConfig(),
            f"grpc://127.0.0.1:{server.port}",
            node="alice",
            keys=tmp_path,
            state=tmp_path / "state",
        )
        first = asyncio.run(manager.sync_weights(old, "edge-1"))
        new = old | {"layer0.lora": old["layer0.lora"] * 1.1}
        second = asyncio.run(manager.sync_weights(new, "edge-1"))
    assert (first.sync_type, second.sync_type) == ("full", "delta")
    assert second.success
    assert second.data_size_bytes < 0.2 * first.data_size_bytes
    assert second.compression_ratio is not None
    with pytest.raises(ConfigurationError, match="flight_endpoint"):
        compat.DeltaSyncManager(compat.DeltaSyncConfig(), "localhost:1")


@pytest.mark.integration
def test_a_benchmark_writes_its_numbers(model: Path, tmp_path: Path) -> None:
    """Latencies, throughput, memory and cosine of an encoder, and one JSON file."""
    config = compat.OptimizationConfig(device_target="cpu")
    runner = compat.BenchmarkRunner(tmp_path / "results")
    found = runner.run_benchmark(model, TEXTS, config)
    assert (found.model_name, found.device, found.ppl) == ("tiny", "cpu", None)
    assert found.batch_throughput_rps is not None
    assert found.batch_throughput_rps > 0
    (file,) = (tmp_path / "results").iterdir()
    assert json.loads(file.read_text())["p95_latency_ms"] == found.p95_latency_ms
    with pytest.raises(InputError, match="no texts"):
        runner.run_benchmark(model, [], config)


def test_no_quantized_weight_is_lost(quantized: Path, model: Path) -> None:
    """The V2 file has every weight of the V1 file."""
    with WeightLoader(quantized) as made, WeightLoader(model / "weights.parquet") as source:
        assert made.names() == source.names()
