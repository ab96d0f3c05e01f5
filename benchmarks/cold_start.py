"""Import to first vector: memopt against plain onnxruntime and tokenizers on the same file.

Each start is a fresh process; the two alternate, so that both see the same machine.

    python benchmarks/cold_start.py --bundle minilm
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from command_line import positive_int, run_main
from rich.console import Console
from rich.table import Table

from memopt import open_bundle
from memopt.runtimes.graph_cache import FOLDER

RAW = """
import sys, time
begin = time.perf_counter()
import numpy as np, onnxruntime as ort
from tokenizers import Tokenizer
options = ort.SessionOptions()
options.intra_op_num_threads = {threads}
session = ort.InferenceSession({model!r}, options, providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file({tokenizer!r})
tokenizer.no_padding()
encoding = tokenizer.encode({text!r})
ids = np.array([encoding.ids], np.int64)
feed = dict(input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
names = [i.name for i in session.get_inputs()]
(vector,) = session.run(["sentence_embedding"], dict((n, feed[n]) for n in names))
assert vector.shape[0] == 1
print(time.perf_counter() - begin)
"""
OURS = """
import time
begin = time.perf_counter()
import memopt
engine = memopt.ArrowEngine({bundle!r}, device="cpu", variant={variant!r})
assert engine.encode([{text!r}]).shape[0] == 1
print(time.perf_counter() - begin)
"""


def seconds(code: str) -> float:
    """Run a snippet in a fresh process and return the seconds it prints."""
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="minilm")
    parser.add_argument("--variant", default="onnx-fp32-fused")
    parser.add_argument("--rounds", type=positive_int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    if bundle.variant(options.variant).format != "onnx":
        parser.error(f"--variant {options.variant} is no ONNX graph, which onnxruntime could open")
    from memopt.runtimes.cpu import usable_cpus

    values = {
        "bundle": str(bundle.path.absolute()),
        "model": str(bundle.file(bundle.variant(options.variant)).absolute()),
        "tokenizer": str(Path(bundle.path / "tokenizer.json").absolute()),
        "variant": options.variant,
        "threads": usable_cpus(),
        "text": "A man is playing a guitar on the stage.",
    }
    raw, ours = RAW.format(**values), OURS.format(**values)
    # Without the cache, as on the very first open; the same folder is made again at once.
    shutil.rmtree(Path(values["model"]).parent / FOLDER, ignore_errors=True)
    first = seconds(ours)
    seconds(raw)
    pairs = [(seconds(raw), seconds(ours)) for _ in range(options.rounds)]
    plain, engine = (statistics.median(side) for side in zip(*pairs, strict=True))
    result = {"raw": plain, "memopt": engine, "ratio": engine / plain, "memopt_first_ever": first}
    if options.json:
        print(json.dumps(result, indent=1))
        return
    table = Table("import to first vector", "median seconds")
    table.add_row("onnxruntime + tokenizers", f"{plain:.3f}")
    table.add_row("memopt", f"{engine:.3f}")
    table.add_row("memopt, first open ever, making the cache", f"{first:.3f}")
    table.add_row("ratio of medians", f"{result['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    run_main(main)
