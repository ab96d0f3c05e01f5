"""How much faster the fused graph is than the portable one, side by side in one run.

    python benchmarks/fusion.py models/minilm [--threads 1 2] [--rounds 40]

Reads onnx/model.onnx of a bundle (or an .onnx file beside or below its config.json), fuses
it, and times portable, fused, fused with split skip layer norms, and ONNX Runtime's dynamic int8 of
the last, in alternating rounds on the same inputs. Times are medians of one run() call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from command_line import positive_int, run_main
from onnxruntime.quantization import QuantType, quantize_dynamic
from rich.console import Console
from rich.table import Table

from memopt.errors import BundleError
from memopt.exporters.fuse import fuse
from memopt.runtimes.cpu_graph import split_skip_layer_norm

TEXT_SHAPES = ((1, 14), (32, 16), (8, 128))
OTHER_SHAPES = ((1, 0), (8, 0))


def inputs(session: ort.InferenceSession, batch: int, length: int) -> dict[str, np.ndarray]:
    """Seeded inputs: token ids without padding, or normal noise of the model's own shape."""
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        if value.type != "tensor(int64)":
            size = [batch, *(d for d in value.shape[1:])]
            feeds[value.name] = rng.standard_normal(size).astype(np.float32)
        elif value.name == "input_ids":
            feeds[value.name] = rng.integers(5, 90, (batch, length))
        else:
            fill = np.ones if value.name == "attention_mask" else np.zeros
            feeds[value.name] = fill((batch, length), np.int64)
    return feeds


def variants(file: Path, folder: Path) -> dict[str, Path]:
    """Write every contender below ``folder``."""
    model = onnx.load(file)
    config = next((p / "config.json" for p in file.parents if (p / "config.json").is_file()), None)
    if config is None:
        raise BundleError(f"no config.json beside or above {file}", fix="give a bundle's graph")
    fused, report = fuse(model, json.loads(config.read_text(encoding="utf-8")))
    Console(stderr=True).print(report)
    made = {"portable": file}
    for name in ("fused", "fused, split norm"):
        made[name] = folder / f"{name.replace(', ', '_').replace(' ', '_')}.onnx"
        onnx.save(fused, made[name])
    split_skip_layer_norm(made["fused, split norm"])
    made["int8 dynamic"] = folder / "int8.onnx"
    quantize_dynamic(
        made["fused, split norm"],
        made["int8 dynamic"],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )
    return made


def open_session(file: Path, threads: int) -> ort.InferenceSession:
    """A CPU session with ``threads`` threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def measure(sessions: dict[str, Any], batch: int, length: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each session, one call each per round."""
    first = next(iter(sessions.values()))
    feeds = inputs(first, batch, length)
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds + 2):
        for name, session in sessions.items():
            begin = time.perf_counter()
            session.run(["sentence_embedding"], feeds)
            seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(values[2:]) for name, values in seconds.items()}


def main() -> None:
    """Print one row per thread count and shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=positive_int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=positive_int, default=40)
    options = parser.parse_args()
    file = options.model if options.model.is_file() else options.model / "onnx" / "model.onnx"
    with tempfile.TemporaryDirectory() as folder:
        files = variants(file, Path(folder))
        table = Table("threads", "input", *files)
        for threads in options.threads:
            sessions = {name: open_session(path, threads) for name, path in files.items()}
            text = any(v.name == "input_ids" for v in sessions["portable"].get_inputs())
            for batch, length in TEXT_SHAPES if text else OTHER_SHAPES:
                rounds = options.rounds * (5 if batch == 1 and text else 1)
                times = measure(sessions, batch, length, rounds)
                base = times["portable"]
                cells = [f"{t:.2f} ms ({base / t:.2f}x)" for t in times.values()]
                table.add_row(str(threads), f"{batch} x {length}" if text else f"{batch}", *cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    run_main(main)
