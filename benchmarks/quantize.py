"""Quality, speed, size and memory of every quantized variant, beside the peers' defaults.

    python benchmarks/quantize.py [models/minilm] [--rounds 5] [--quick] [--json]

One run: every graph is made from the bundle's own float graphs and the same calibration texts, and
encodes the same length-sorted batches, in turn, round by round. OpenVINO graphs run in two streams,
ONNX Runtime and torch with two threads. Quality is measured on the STS-B dev sentences that nobody
calibrated with; Spearman on the pairs of which both sentences are such. ``--quick`` leaves out the
memory measurements.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from command_line import positive_int, run_main
from quantize_peers import PLAIN, TORCH, Batches, Contender, opened, peers
from rich.console import Console
from rich.table import Table

from memopt.bundle import Bundle, open_bundle
from memopt.exporters.from_v2 import export_v2
from memopt.graphs.session import feeds
from memopt.quantization.accuracy.calibration import CalibrationSet, split
from memopt.quantization.accuracy.gate import Gate
from memopt.quantization.accuracy.validate import _spearman
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe
from memopt.runtimes.graph_cache import SWITCH
from memopt.runtimes.vectors import row_cosines
from memopt.weights.convert import resolve

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "stsb-en-dev.csv"
STATIC, NEARLY, RTN, GPTQ = (
    "openvino-int8-static",
    "onnx-int8-weight-only",
    "onnx-int4-weight-only",
    "onnx-int4-weight-only-gptq",
)
OURS = (
    Recipe(method="static"),
    Recipe(method="nncf"),
    Recipe(method="static", target="cpu"),
    Recipe(method="nncf", target="cpu"),
    Recipe(method="dynamic"),
    Recipe(method="nncf-weights"),
    Recipe(method="weight-only"),
    Recipe(method="weight-only", weight_type="int4"),
    Recipe(method="weight-only", weight_type="int4", algorithm="gptq"),
    Recipe(method="nncf-weights", weight_type="int4", algorithm="awq+scale-estimation"),
    Recipe(method="nncf-weights", weight_type="int4", algorithm="gptq"),
    Recipe(method="nncf-weights", weight_type="nf4"),
    Recipe(method="weight-only", weight_type="int2"),
    Recipe(method="weight-only", weight_type="int2", algorithm="gptq"),
)
# Weights as Parquet, run as the graph that `memopt export --weights` makes of them.
ARROW = (
    Recipe(method="arrow"),
    Recipe(method="arrow", weight_type="int4", algorithm="gptq"),
)
# Memory is measured of these.
RESIDENT = ("openvino-int8-static", "onnx-int8-static", "onnx-int8-dynamic", NEARLY)


def variants(bundle: Bundle) -> list[Contender]:
    """Make every variant of ours, failing ones too, and open it."""
    samples = Samples(calibration=DATA)
    made = []
    with Console(stderr=True).status("quantizing") as status:
        for recipe in (*OURS, *ARROW):
            status.update(recipe.variant_name)
            if recipe.method == "arrow":
                gate = Gate()
                file = quantize(bundle, samples, recipe, gate=gate, keep_failing=True).file
                variant = export_v2(open_bundle(bundle.path), file)
            else:
                variant = quantize(bundle, samples, recipe, keep_failing=True).variant
            mark = "" if variant.passed else " (fails its gate)"
            made.append(opened(bundle, variant, f"memopt {variant.name}{mark}"))
    return made


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


def rows_of(
    contenders: list[Contender],
    batches: Batches,
    pairs: list[tuple[int, int, float]],
    seconds: dict[str, float],
) -> list[dict[str, Any]]:
    """Return size, speed and quality of each; the first contender is what the rest must equal."""
    reference = contenders[0].encode(batches)
    scores = [score for _, _, score in pairs]

    def spearman(rows: np.ndarray) -> float:
        left, right = rows[[p[0] for p in pairs]], rows[[p[1] for p in pairs]]
        return _spearman(row_cosines(left, right), scores)

    expected = spearman(reference)
    found = []
    for contender in contenders:
        rows = contender.encode(batches)
        cosines = row_cosines(rows, reference)
        found.append(
            {
                "name": contender.name,
                "bytes": contender.bytes,
                "of_float": contender.bytes / contenders[0].bytes,
                "per_second": len(reference) / seconds[contender.name],
                "x_torch": seconds[TORCH] / seconds[contender.name],
                "x_plain": seconds[PLAIN] / seconds[contender.name],
                "cosine_min": float(cosines.min()),
                "cosine_p1": float(np.percentile(cosines, 1)),
                "cosine_mean": float(cosines.mean()),
                "spearman": spearman(rows),
                "spearman_change": spearman(rows) - expected,
            }
        )
    return found


def targets(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return what is to be reached, what was, and whether that suffices."""
    by_name = {row["name"].removeprefix("memopt ").partition(" (")[0]: row for row in rows}
    full = by_name[STATIC]
    gain = by_name[GPTQ]["cosine_min"] - by_name[RTN]["cosine_min"]
    checks = (
        ("full int8: min cosine >= 0.98", full["cosine_min"], full["cosine_min"] >= 0.98),
        ("full int8: mean cosine >= 0.995", full["cosine_mean"], full["cosine_mean"] >= 0.995),
        (
            "full int8: Spearman within 0.003",
            full["spearman_change"],
            abs(full["spearman_change"]) <= 0.003,
        ),
        (f"full int8: >= 0.95x {PLAIN}", full["x_plain"], full["x_plain"] >= 0.95),
        ("full int8: file <= 26 %", full["of_float"], full["of_float"] <= 0.26),
        (
            "weight-only int8: min cosine >= 0.995",
            by_name[NEARLY]["cosine_min"],
            by_name[NEARLY]["cosine_min"] >= 0.995,
        ),
        ("int4 GPTQ: min cosine above RTN", gain, gain > 0.01),
    )
    return [(what, f"{value:+.4f}", "yes" if good else "NO") for what, value, good in checks]


_RESIDENT = """
import json, sys
import memopt, numpy, openvino, onnxruntime, tokenizers
from memopt.runtimes.engine import ArrowEngine
def resident():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Rss:"):
            return int(line.split()[1]) / 1024
given = json.load(sys.stdin)
# Runtimes load most of their code, and start threads, with the first graph: one of one product.
one = bytes.fromhex(given["one"])
feed = {name: numpy.ones((1, 1), numpy.float32) for name in "ab"}
onnxruntime.InferenceSession(one, providers=["CPUExecutionProvider"]).run(None, feed)
core = openvino.Core()
core.compile_model(core.read_model(one, b""), "CPU")(feed)
before = resident()
with ArrowEngine(sys.argv[1], variant=sys.argv[2]) as engine:
    engine.encode(given["texts"])
    print(resident() - before)
"""


def resident(bundle: Bundle, variant: str, texts: list[str], *, cache: bool = True) -> float:
    """Return the MB a process grew by, libraries loaded, opening a variant and encoding texts.

    Without ``cache`` onnxruntime reads and packs the weights itself, as it does for everybody. The
    process before the measured one makes the cache.
    """
    from onnx import TensorProto, helper

    a, b, c = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1]) for n in "abc")
    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "one", [a, b], [c])
    one = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    given = {"texts": texts, "one": one.SerializeToString().hex()}
    for _ in range(1 + cache):
        done = subprocess.run(
            [sys.executable, "-c", _RESIDENT, str(bundle.path), variant],
            input=json.dumps(given), capture_output=True, text=True, check=True,
            env={**os.environ, SWITCH: str(int(cache))},
        )  # fmt: skip
    return float(done.stdout.split()[-1])


_PEAK = """
import sys
from pathlib import Path
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe
quantize(sys.argv[1], Samples(calibration=Path(sys.argv[2]), samples=int(sys.argv[3]),
         validation_samples=64), Recipe(ranges=sys.argv[4]), keep_failing=True)
# Not ru_maxrss: that begins at what the process had that started this one.
status = Path("/proc/self/status").read_text().split()
print(int(status[status.index("VmHWM:") + 1]) / 1024)
"""


def peak(bundle: Bundle, samples: int, ranges: str) -> float:
    """Return the peak MB of a process that calibrates static int8 with so many samples."""
    command = [sys.executable, "-c", _PEAK, str(bundle.path), str(DATA), str(samples), ranges]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def memory(bundle: Bundle, texts: list[str]) -> list[dict[str, Any]]:
    """Return what processes that open variants, and that calibrate, take."""
    rows: list[dict[str, Any]] = []
    few = texts[:100]
    plain = resident(bundle, "onnx-fp32-fused", few, cache=False)
    rows.append({"what": "onnxruntime opens the float graph", "mb": plain, "share_plain": 1.0})
    for base, names in (("openvino-fp32", RESIDENT[:1]), ("onnx-fp32-fused", RESIDENT[1:])):
        grown = resident(bundle, base, few)
        for name in (base, *names):
            mine = grown if name == base else resident(bundle, name, few)
            shares = {"share": mine / grown, "share_plain": mine / plain}
            rows.append({"what": f"opens {name}, encodes 100", "mb": mine, **shares})
    for ranges in ("minmax", "entropy"):
        for count in (100, 1000):
            mb = peak(bundle, count, ranges)
            rows.append(
                {"what": f"peak, calibrates static int8, {ranges}, {count} samples", "mb": mb}
            )
    return rows


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print the table of variants, and the one of what is to be reached."""
    table = Table(
        "variant", "MB", "of float", "texts/s", "x torch", f"x {PLAIN}",
        "min cosine", "1 %", "mean", "Spearman", title=title,
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['of_float']:.1%}",
            f"{row['per_second']:,.0f}",
            f"{row['x_torch']:.2f}",
            f"{row['x_plain']:.2f}",
            f"{row['cosine_min']:.4f}",
            f"{row['cosine_p1']:.4f}",
            f"{row['cosine_mean']:.4f}",
            f"{row['spearman']:.4f} ({row['spearman_change']:+.4f})",
        )
    console = Console(width=150)
    console.print(table)
    goals = Table("to reach", "measured", "reached")
    for goal in targets(rows):
        goals.add_row(*goal)
    console.print(goals)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", default="models/minilm")
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--quick", action="store_true", help="no memory measurements")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not DATA.is_file():
        raise SystemExit(f"{DATA} is not there: this benchmark needs the STS-B dev sentences")
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
            *variants(bundle),
        ]
        rows = rows_of(contenders, batches, pairs, measure(contenders, batches, args.rounds))
        spent = [] if args.quick else memory(bundle, texts)
    if args.json:
        print(json.dumps({"variants": rows, "memory": spent}, indent=1))
        return
    show(
        rows,
        f"{len(texts)} held-out sentences, {len(pairs)} pairs, {len(calibration)} calibration "
        f"texts, median of {args.rounds} rounds",
    )
    if spent:
        table = Table("process", "MB", "of float", "of onnxruntime's float", title="Memory")
        for row in spent:
            shares = [f"{row[k]:.0%}" if k in row else "" for k in ("share", "share_plain")]
            table.add_row(row["what"], f"{row['mb']:.0f}", *shares)
        Console(width=150).print(table)


if __name__ == "__main__":
    run_main(main)
