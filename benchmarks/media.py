"""CLIP ViT-B/32 images and Whisper-tiny sound: parity and speed beside torch float32, in one run.

    python benchmarks/media.py [--rounds 5] [--work .cache/media] [--json]

The weights are seeded noise on the real configurations: speed and parity only, nothing about
meaning. With them any two inputs have nearly the same vector, in float too (the mean cosine of
different inputs is printed), so that a cosine between float and int8 says nothing. Parity is
therefore the relative error of centred vectors, |int8 - float| / |float - mean of float|, on
inputs that were not calibrated with: 0 is equal, 1 no better than answering the mean. Two speeds:
the graph alone on the same tensors, and items per second from PIL image or waveform to vector,
where torch is given what transformers' own processor makes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from command_line import positive_int, run_main
from make_models import make
from PIL import Image
from rich.console import Console
from rich.table import Table

from memopt import ArrowEngine, open_bundle
from memopt.bundle import MANIFEST, Bundle
from memopt.exporters.base import export
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe
from memopt.runtimes.base import Placement, Settings
from memopt.runtimes.frontend import make_front_end
from memopt.runtimes.providers import opener
from memopt.weights.convert import convert

MODELS = {"clip-vit-base-patch32": 8, "whisper-tiny": 2}  # items in a batch
TASKS = {"clip-vit-base-patch32": "image-embedding", "whisper-tiny": "audio-embedding"}
CALIBRATION = 32
HELD_OUT = 16  # of another seed than what was calibrated and validated with


def prepare(name: str, work: Path) -> tuple[Path, Bundle]:
    """Return the Hugging Face folder and the bundle with every variant, made once."""
    source, home = work / name, work / f"{name}-bundle"
    if not (source / "config.json").is_file():
        make(name, work)
    if not (home / MANIFEST).is_file():
        convert(str(source), home, task=TASKS[name])
    bundle = open_bundle(home)
    for format_, precision, variant in (
        ("onnx", "fp32", "onnx-fp32"),
        ("openvino", "fp32", "openvino-fp32"),
        ("openvino", "bf16", "openvino-bf16"),
    ):
        if variant not in bundle.manifest.variants:
            export(bundle, format=format_, precision=precision)
            bundle = open_bundle(home)
    if "openvino-int8-static" not in bundle.manifest.variants:
        data = Samples(
            calibration=_files(bundle, work / f"{name}-calibration"),
            samples=CALIBRATION // 2,
            validation_samples=CALIBRATION // 2,
        )
        quantize(home, data, Recipe(), keep_failing=True)
    return source, open_bundle(home)


def _files(bundle: Bundle, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, item in enumerate(varied(bundle.manifest.modality, CALIBRATION, seed=0)):
        if bundle.manifest.modality == "image":
            Image.fromarray(item).save(folder / f"{index:03}.png")
        else:
            soundfile.write(folder / f"{index:03}.wav", item, 16_000)
    return folder


def varied(modality: str, count: int, *, seed: int) -> list[Any]:
    """Return inputs that differ: coloured shapes over gradients, chords of changing loudness.

    Noise, as `memopt bench` uses it, is the same picture and the same sound again and again.
    """
    generator = np.random.default_rng(seed)
    made: list[Any] = []
    for _ in range(count):
        if modality == "image":
            coarse = generator.integers(0, 256, (generator.integers(2, 9), 5, 3), dtype=np.uint8)
            made.append(np.asarray(Image.fromarray(coarse).resize((224, 224), Image.BICUBIC)))
            continue
        time_ = np.arange(30 * 16_000) / 16_000
        sound = generator.normal(0, 0.01, len(time_))
        for pitch in generator.uniform(80, 4000, 4):
            beat = np.sin(2 * np.pi * generator.uniform(0.1, 3) * time_) ** 2
            sound += 0.2 * beat * np.sin(2 * np.pi * pitch * time_)
        made.append(sound.astype(np.float32))
    return made


def parity(expected: np.ndarray, got: np.ndarray) -> float:
    """Return the relative error of unit vectors (n, dim) around the mean of the expected ones."""
    centred = expected - expected.mean(axis=0)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(centred))


def alike(vectors: np.ndarray) -> float:
    """Return the mean cosine of different inputs."""
    cosines = vectors @ vectors.T
    return float(cosines[~np.eye(len(vectors), dtype=bool)].mean())


def torch_runner(name: str, source: Path) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return (items -> tensors, tensors -> vectors) of transformers."""
    if name.startswith("clip"):
        clip = transformers.CLIPVisionModelWithProjection.from_pretrained(source).eval()
        images = transformers.CLIPImageProcessor.from_pretrained(source)

        def see(items: Any) -> Any:
            return images([Image.fromarray(i) for i in items], return_tensors="pt")["pixel_values"]

        return see, lambda x: clip(pixel_values=x).image_embeds
    whisper = transformers.WhisperForConditionalGeneration.from_pretrained(source).eval()
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(source)

    def hear(items: Any) -> Any:
        return extractor(items, sampling_rate=16_000, return_tensors="pt")["input_features"]

    return hear, lambda x: whisper.model.encoder(x).last_hidden_state.mean(1)


def measure(name: str, batch: int, work: Path, rounds: int) -> list[dict[str, Any]]:
    """Time torch and every variant in turn, round by round."""
    source, bundle = prepare(name, work)
    held_out = varied(bundle.manifest.modality, HELD_OUT, seed=1)
    items = held_out[:batch]
    process, model = torch_runner(name, source)
    graphs: dict[str, Callable[[], Any]] = {}
    whole: dict[str, Callable[[], Any]] = {}
    with torch.inference_mode():
        tensors = process(items)
    graphs["torch float32"] = lambda: torch.nn.functional.normalize(model(tensors)).numpy()
    whole["torch float32"] = lambda: model(process(items)).numpy()
    each: dict[str, Callable[[Any], Any]] = {"torch float32": lambda x: model(process(x)).numpy()}
    for variant in bundle.manifest.variants.values():
        provider = "openvino" if variant.format == "openvino" else "cpu"
        backend = opener(provider)(bundle, Placement(provider, variant), Settings())
        feed = make_front_end(bundle, backend.inputs).prepare(items)[0].feed
        graphs[variant.name] = lambda backend=backend, feed=feed: backend.run(feed)  # type: ignore[misc]
        engine = ArrowEngine(str(bundle.path), variant=variant.name)
        whole[variant.name] = lambda engine=engine: engine.encode(items)  # type: ignore[misc]
        each[variant.name] = engine.encode
    vectors = {}
    with torch.inference_mode():
        for label, encode in each.items():
            rows = np.concatenate([encode([item]) for item in held_out])
            vectors[label] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    seconds: dict[tuple[str, str], list[float]] = {}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for kind, contenders in (("graph", graphs), ("whole", whole)):
                for label, work_ in contenders.items():
                    start = time.perf_counter()
                    work_()
                    if turn:  # the first round warms up
                        seconds.setdefault((kind, label), []).append(time.perf_counter() - start)
    reference = vectors["torch float32"]
    rows = []
    for label in graphs:
        row: dict[str, Any] = {"model": name, "variant": label, "batch": batch}
        row["relative_error"] = parity(reference, vectors[label])
        row["alike"] = alike(reference)
        for kind in ("graph", "whole"):
            mine, torchs = seconds[kind, label], seconds[kind, "torch float32"]
            row[f"{kind}_per_second"] = batch / median(mine)
            row[f"{kind}_vs_torch"] = median(t / m for t, m in zip(torchs, mine, strict=True))
        rows.append(row)
    return rows


def main() -> None:
    """Measure both models and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--work", type=Path, default=Path(".cache/media"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    with Console(stderr=True).status("measuring") as status:
        for name, batch in MODELS.items():
            status.update(name)
            rows += measure(name, batch, options.work, options.rounds)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(
        "model", "variant", "relative error", "graph/s", "vs torch", "whole/s", "vs torch"
    )
    for row in rows:
        speeds = [row["graph_per_second"], row["graph_vs_torch"]]
        speeds += [row["whole_per_second"], row["whole_vs_torch"]]
        formats = (f"{speeds[0]:.1f}", f"{speeds[1]:.2f}x", f"{speeds[2]:.1f}", f"{speeds[3]:.2f}x")
        table.add_row(row["model"], row["variant"], f"{row['relative_error']:.4f}", *formats)
    Console(width=120).print(table)
    for name in MODELS:
        value = next(row["alike"] for row in rows if row["model"] == name)
        print(f"{name}: random weights, mean cosine of different inputs in float {value:.4f}")


if __name__ == "__main__":
    run_main(main)
