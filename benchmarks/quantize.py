"""Quality, speed, size and memory of every quantized variant, beside the peers' defaults.

    python benchmarks/quantize.py [models/minilm] [--rounds 5] [--quick]

One run: every graph is made from the bundle's own float graphs and the same calibration texts, and
encodes the same length-sorted batches, in turn, round by round. OpenVINO graphs run in two streams,
ONNX Runtime with two threads. Quality is measured on the STS-B dev sentences that nobody calibrated
with; Spearman on the pairs of which both sentences are such.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from memopt.bundle import Bundle, Variant, open_bundle
from memopt.quantization.calibration import CalibrationSet, split
from memopt.quantization.graph_runner import feeds
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe
from memopt.quantization.validate import _cosines, _spearman
from memopt.weights.convert import resolve

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "stsb-en-dev.csv"
PLAIN = "nncf.quantize, defaults"
OURS = (
    Recipe(method="static"),
    Recipe(method="nncf"),
    Recipe(method="static", target="cpu"),
    Recipe(method="dynamic"),
    Recipe(method="nncf-weights"),
    Recipe(method="weight-only"),
    Recipe(method="weight-only", weight_type="int4"),
    Recipe(method="weight-only", weight_type="int4", algorithm="gptq"),
    Recipe(method="nncf-weights", weight_type="int4", algorithm="awq+scale-estimation"),
)
Batches = list[tuple[list[int], dict[str, Any]]]


@dataclass
class Contender:
    """One graph: how to encode all batches with it, and its bytes."""

    name: str
    encode: Callable[[Batches], np.ndarray]
    bytes: int


def openvino(name: str, path: Path, options: dict[str, str], width: int) -> Contender:
    """Open a graph in two streams behind an AsyncInferQueue."""
    import openvino as ov

    config = {"NUM_STREAMS": "2", "INFERENCE_NUM_THREADS": "2", "PERFORMANCE_HINT": "THROUGHPUT"}
    compiled = ov.Core().compile_model(path, "CPU", {**config, **options})
    queue = ov.AsyncInferQueue(compiled, 2)

    def encode(batches: Batches) -> np.ndarray:
        rows = np.zeros((sum(len(places) for places, _ in batches), width), np.float32)

        def store(request: Any, places: list[int]) -> None:
            rows[places] = request.get_tensor("sentence_embedding").data

        queue.set_callback(store)
        for places, feed in batches:
            queue.start_async(feed, places)
        queue.wait_all()
        return rows

    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return Contender(name, encode, size)


def onnx(name: str, path: Path, width: int) -> Contender:
    """Open a graph in ONNX Runtime with two threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def encode(batches: Batches) -> np.ndarray:
        rows = np.zeros((sum(len(places) for places, _ in batches), width), np.float32)
        for places, feed in batches:
            rows[places] = session.run(["sentence_embedding"], feed)[0]
        return rows

    return Contender(name, encode, path.stat().st_size)


def peers(bundle: Bundle, calibration: list[dict[str, Any]], folder: Path) -> list[Contender]:
    """Quantize the bundle's float graphs with each library's own defaults."""
    import nncf
    import openvino as ov
    from onnxruntime import quantization as ort_tools
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    width = bundle.manifest.dimension or 0
    graph = bundle.path / "onnx" / "model.onnx"
    model = ov.Core().read_model(bundle.path / "openvino" / "openvino_model.xml")
    made = []
    nncf.set_log_level(logging.ERROR)
    with redirect_stdout(io.StringIO()):
        for name, graph_made in (
            (
                PLAIN,
                nncf.quantize(
                    model.clone(), nncf.Dataset(calibration), model_type=nncf.ModelType.TRANSFORMER
                ),
            ),
            ("nncf.compress_weights, int8", nncf.compress_weights(model.clone())),
        ):
            path = folder / f"{len(made)}.xml"
            ov.save_model(graph_made, path, compress_to_fp16=False)
            made.append(openvino(name, path, {"INFERENCE_PRECISION_HINT": "f32"}, width))
    logging.disable(logging.WARNING)

    class Reader(ort_tools.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    path = folder / "static.onnx"
    ort_tools.quantize_static(graph, path, Reader(), per_channel=True)
    made.append(onnx("onnxruntime quantize_static, per channel", path, width))
    path = folder / "dynamic.onnx"
    # What sentence-transformers' export_dynamic_quantized_onnx_model asks for with avx512_vnni.
    ort_tools.quantize_dynamic(graph, path, per_channel=True)
    made.append(onnx("onnxruntime quantize_dynamic, per channel", path, width))
    for bits in (8, 4):
        tool = MatMulNBitsQuantizer(str(graph), bits=bits, block_size=32, is_symmetric=True)
        tool.process()
        path = folder / f"nbits{bits}.onnx"
        tool.model.save_model_to_file(str(path))
        made.append(onnx(f"onnxruntime MatMulNBits, int{bits}, block 32", path, width))
    logging.disable(logging.NOTSET)
    return made


def opened(bundle: Bundle, variant: Variant, label: str) -> Contender:
    """Open a variant of the bundle as the contenders are opened."""
    path, width = bundle.file(variant), bundle.manifest.dimension or 0
    if variant.format == "openvino":
        return openvino(label, path, dict(variant.options), width)
    return onnx(label, path, width)


def held_out(calibration: CalibrationSet) -> tuple[list[str], list[tuple[int, int, float]]]:
    """Return the dev sentences not calibrated with, and the scored pairs of two such."""
    used = set(calibration.items)
    with DATA.open(encoding="utf-8", newline="") as file:
        rows = [(a, b, float(score)) for a, b, score in csv.reader(file)]
    texts = list(dict.fromkeys(t for a, b, _ in rows for t in (a, b) if t.strip() not in used))
    place = {text: i for i, text in enumerate(texts)}
    return texts, [(place[a], place[b], s) for a, b, s in rows if a in place and b in place]


def measure(contenders: list[Contender], batches: Batches, rounds: int) -> dict[str, float]:
    """Return the median seconds of each over alternating rounds; the first is not counted."""
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    for number in range(rounds + 1):
        for contender in contenders:
            start = time.perf_counter()
            contender.encode(batches)
            if number:
                times[contender.name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


_RESIDENT = """
import json, sys
import memopt, numpy, openvino, onnxruntime, tokenizers
from memopt.runtimes.engine import ArrowEngine
def anonymous():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
before = anonymous()
with ArrowEngine(sys.argv[1], variant=sys.argv[2]) as engine:
    engine.encode(json.load(sys.stdin))
    print(anonymous() - before)
"""


def resident(bundle: Bundle, variant: str, texts: list[str]) -> float:
    """Return the MB a process grew by, opening a variant and encoding 100 texts."""
    done = subprocess.run(
        [sys.executable, "-c", _RESIDENT, str(bundle.path), variant],
        input=json.dumps(texts[:100]), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


_PEAK = """
import resource, sys
from pathlib import Path
from memopt.quantization.quantize import Samples, quantize
quantize(sys.argv[1], Samples(calibration=Path(sys.argv[2]), samples=int(sys.argv[3]),
         validation_samples=64), keep_failing=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak(bundle: Bundle, samples: int) -> float:
    """Return the peak MB of a process that calibrates static int8 with so many samples."""
    command = [sys.executable, "-c", _PEAK, str(bundle.path), str(DATA), str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?", default="models/minilm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="no memory measurements")
    args = parser.parse_args()
    if not DATA.is_file():
        raise SystemExit(f"{DATA} is not there: this benchmark needs the STS-B dev sentences")
    console = Console(width=150)
    with tempfile.TemporaryDirectory(prefix="memopt-quantize-") as temporary:
        folder = Path(temporary) / "bundle"
        shutil.copytree(resolve(args.bundle).path, folder)
        bundle = open_bundle(folder)
        calibration, _ = split(DATA)
        texts, pairs = held_out(calibration)
        base = bundle.variant("openvino-fp32")
        batches: Batches = [(p, dict(f)) for p, f in feeds(bundle, texts, base.inputs, batch=32)]
        inputs = [dict(f) for _, f in feeds(bundle, calibration.items, base.inputs, batch=8)]
        contenders = [
            opened(bundle, base, "float, OpenVINO"),
            opened(bundle, bundle.variant("onnx-fp32-fused"), "float, ONNX Runtime fused"),
            *peers(bundle, inputs, Path(temporary)),
        ]
        samples = Samples(calibration=DATA)
        for recipe in OURS:
            result = quantize(bundle, samples, recipe, keep_failing=True)
            mark = "" if result.variant.passed else " (fails its gate)"
            label = f"memopt {result.variant.name}{mark}"
            contenders.append(opened(bundle, result.variant, label))
        seconds = measure(contenders, batches, args.rounds)
        reference = contenders[0].encode(batches)
        scores = [score for _, _, score in pairs]

        def spearman(rows: np.ndarray) -> float:
            left, right = rows[[p[0] for p in pairs]], rows[[p[1] for p in pairs]]
            return _spearman(_cosines(left, right), scores)

        table = Table(
            "variant", "MB", "of float", "sentences/s", f"x {PLAIN}",
            "min cosine", "1 %", "mean", "Spearman - float",
            title=f"{len(texts)} held-out sentences, {len(pairs)} pairs, "
            f"{len(calibration)} calibration texts, median of {args.rounds} rounds",
        )  # fmt: skip
        for contender in contenders:
            rows = contender.encode(batches)
            cosines = _cosines(rows, reference)
            speed = len(texts) / seconds[contender.name]
            table.add_row(
                contender.name,
                f"{contender.bytes / 1e6:.1f}",
                f"{contender.bytes / contenders[0].bytes:.1%}",
                f"{speed:,.0f}",
                f"{seconds[PLAIN] / seconds[contender.name]:.2f}",
                f"{cosines.min():.4f}",
                f"{np.percentile(cosines, 1):.4f}",
                f"{cosines.mean():.4f}",
                f"{spearman(rows) - spearman(reference):+.4f}",
            )
        console.print(table)
        if args.quick:
            return
        memory = Table("process", "MB", title="Memory")
        float_growth = resident(bundle, "openvino-fp32", texts)
        memory.add_row("opens openvino-fp32, encodes 100", f"{float_growth:.0f}")
        for name in ("openvino-int8-static", "openvino-int8-weight-only", "onnx-int8-dynamic"):
            growth = resident(bundle, name, texts)
            memory.add_row(
                f"opens {name}, encodes 100", f"{growth:.0f} ({growth / float_growth:.0%})"
            )
        for count in (100, 1000):
            memory.add_row(f"peak, static calibration with {count}", f"{peak(bundle, count):.0f}")
        console.print(memory)


if __name__ == "__main__":
    main()
