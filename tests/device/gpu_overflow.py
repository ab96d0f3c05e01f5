"""Run a GPU out of memory for real and see that every answer stays right.

Not part of the suite: it needs an NVIDIA GPU, onnxruntime-gpu, and torch to fill the memory. It
carries its own graph, so neither a model nor transformers is needed. Run it from the root:

    python tests/device/gpu_overflow.py          # under a minute on a GPU of 80 GB
    python tests/device/gpu_overflow.py --cpu    # the same steps without a GPU, to try the script

Three ways of running out, each against numpy's answer: the limit that memopt sets, the memory that
another user of the GPU left, and nothing left even for one row, where the CPU takes over.
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from memopt.bundle import Bundle, Manifest, Variant
from memopt.metrics import FALLBACK_EVENTS, value
from memopt.runtimes.engine import ArrowEngine

# input_values (batch, samples) -> mean over samples of tanh(x * sin(0..255)), float32 (batch, 256):
# each sample becomes 256 floats on the way, so a row of 200,000 takes 205 MB, twice.
GRAPH = (
    "CAk6ugIKEwoBYQoBYgoBYxIBciIFUmFuZ2UKCwoBchIBdyIDU2luCiAKDGlucHV0X3ZhbHVlcwoCYXgSAXUiCVVuc3F1"
    "ZWV6ZQoOCgF1CgF3EgFtIgNNdWwKDAoBbRIBdCIEVGFuaAo5CgF0CgNvbmUSEnNlbnRlbmNlX2VtYmVkZGluZyIKUmVk"
    "dWNlTWVhbioPCghrZWVwZGltcxgAoAECEgFnKgsQASIEAAAAAEIBYSoLEAEiBAAAgENCAWIqCxABIgQAAIA/QgFjKgsI"
    "ARAHOgECQgJheCoMCAEQBzoBAUIDb25lWioKDGlucHV0X3ZhbHVlcxIaChgIARIUCgcSBWJhdGNoCgkSB3NhbXBsZXNi"
    "KgoSc2VudGVuY2VfZW1iZWRkaW5nEhQKEggBEg4KBxIFYmF0Y2gKAwiAAkIECgAQEg=="
)
SAMPLES, ROWS, MIB = 200_000, 8, 1 << 20
TOLERANCE = 1e-4  # sums of 200,000 float32 in another order


def bundle(folder: Path) -> Bundle:
    """Write the graph as an audio bundle, whose inputs are plain arrays."""
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(base64.b64decode(GRAPH))
    (folder / "config.json").write_text('{"model_type": "wav2vec2"}')
    processor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    variant = Variant(
        name="onnx-fp32",
        format="onnx",
        precision="fp32",
        file="onnx/model.onnx",
        inputs=("input_values",),
        output="sentence_embedding",
    )
    manifest = Manifest(
        name="overflow",
        task="audio-embedding",
        modality="audio",
        architecture="Overflow",
        model_type="wav2vec2",
        dimension=256,
        variants={"onnx-fp32": variant},
    )
    return Bundle(folder, manifest)


def expected(waves: list[np.ndarray]) -> np.ndarray:
    """What the graph says, in numpy, a piece at a time."""
    sines = np.sin(np.arange(256, dtype=np.float32))
    sums = np.zeros((len(waves), 256), np.float64)
    for row, wave in enumerate(waves):
        for piece in np.array_split(wave, 20):
            sums[row] += np.tanh(piece[:, None] * sines).sum(0, dtype=np.float64)
    return (sums / SAMPLES).astype(np.float32)


def check(name: str, engine: ArrowEngine, waves: list[np.ndarray], right: np.ndarray) -> None:
    """Encode twice and print where it ran and what happened; stop where an answer is wrong."""
    for turn in (1, 2):
        got = engine.encode(waves, normalize=False, batch_size=ROWS)
        worst = float(np.abs(got - right).max())
        events = [(e.from_, e.to, e.kind) for e in engine.events]
        print(
            f"{name}, turn {turn}: on {engine.device_info()['device']}, error {worst:.1e}, {events}"
        )
        assert worst < TOLERANCE, f"{name}: wrong answer"


def fill(leave: int) -> Any:
    """Hold all the GPU's memory but ``leave`` bytes until the result is dropped."""
    import torch

    free, total = torch.cuda.mem_get_info()
    print(f"torch {torch.__version__} holds all but {leave / MIB:.0f} of {total / MIB:.0f} MiB")
    return torch.empty(max(0, free - leave), dtype=torch.uint8, device="cuda")


def main() -> None:
    """Run the three checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="try the script without a GPU")
    on_cpu = parser.parse_args().cpu
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    generator = np.random.default_rng(0)
    waves = list(generator.standard_normal((ROWS, SAMPLES), dtype=np.float32))
    right = expected(waves)
    device = "cpu" if on_cpu else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        made = bundle(Path(folder))
        if on_cpu:
            with ArrowEngine(made, device=device) as engine:
                check("no limit", engine, waves, right)
            return

        # 1. memopt's own limit: 8 rows need 3.3 GB and 4 need 1.6, so they come in twos.
        with ArrowEngine(made, device=device, memory_limit_mb=1100) as engine:
            check("limit of 1100 MB", engine, waves, right)
            assert engine.device_info()["device"] == "cuda", "left the GPU instead of halving"
            first = engine.events[0]
            assert (first.from_, first.to, first.kind) == ("cuda", "cuda", "memory")

        # 2. Another user of the GPU: the driver itself refuses.
        with ArrowEngine(made, device=device, vram_threshold=1.0) as engine:
            engine.encode(waves[:1], normalize=False)  # the context and one row's memory are there
            held = fill(1100 * MIB)
            check("GPU nearly full", engine, waves, right)
            assert engine.device_info()["device"] == "cuda", "left the GPU instead of halving"
            assert engine.events, "8 rows fitted: fill more"
            del held
            import torch

            torch.cuda.empty_cache()

        # 3. Nothing left: the CPU takes over.
        with ArrowEngine(made, device=device, vram_threshold=1.0) as engine:
            engine.encode([waves[0][:1000]], normalize=False)
            held = fill(64 * MIB)
            check("GPU full", engine, waves, right)
            assert engine.device_info()["device"] == "cpu", "who answered?"
            assert ("cuda", "cpu", "memory") in [(e.from_, e.to, e.kind) for e in engine.events]
            del held
    labels = {"from": "cuda", "to": "cpu", "reason": "memory"}
    print("metric", FALLBACK_EVENTS, labels, value(FALLBACK_EVENTS, **labels))
    print("ok: every answer was right")


if __name__ == "__main__":
    main()
