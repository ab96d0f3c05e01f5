"""Peak memory of converting a large model: memopt convert against pyarrow's ParquetWriter.

    python benchmarks/convert_memory.py [--megabytes 1024] [--tensor 16]

Makes a random safetensors file, converts it in one fresh process per way and prints the rise of
each process's peak resident memory over its peak just before (libraries loaded, a tiny file done).
The peer writes the same rows, one tensor at a time, with ``pyarrow.parquet.ParquetWriter``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from command_line import positive_int, run_main

MEMOPT = """
from memopt.weights.convert import convert
def work(source, target):
    convert(source, target)
"""
PYARROW = """
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from pathlib import Path
from memopt.weights.schema import split_name, v1
from memopt.weights.safetensors import open_safetensors
def work(source, target):
    file = open_safetensors(Path(source) / "model.safetensors")
    Path(target).mkdir()
    schema = v1("float32", with_bytes=False)
    with pq.ParquetWriter(Path(target) / "weights.parquet", schema, compression="none",
                          use_dictionary=False, data_page_size=1 << 29) as writer:
        for name in file.tensors:
            array = file.read(name)
            data = pa.ListArray.from_arrays(pa.array([0, array.size], pa.int32()),
                                            pa.array(array.reshape(-1)))
            layer, weight = split_name(name)
            writer.write_table(pa.table([[layer], [weight], data, [list(array.shape)],
                                         ["float32"]], schema=schema))
"""
MEASURE = """
import json, resource, sys, time
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
work(sys.argv[1], sys.argv[3])
before, start = peak(), time.perf_counter()
work(sys.argv[2], sys.argv[4])
print(json.dumps({"rise": peak() - before, "before": before,
                  "seconds": time.perf_counter() - start}))
"""


def make_model(folder: Path, megabytes: int, tensor: int) -> None:
    """Write a folder with config.json and a random float32 model.safetensors, streaming."""
    folder.mkdir()
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    size, count = tensor << 20, megabytes // tensor
    entries = {
        f"layer.{i}.weight": {
            "dtype": "F32",
            "shape": [1024, size // 4096],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(count)
    }
    header = json.dumps(entries).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(count):
            file.write(rng.standard_normal(size // 4, np.float32).tobytes())


def main() -> None:
    """Measure both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=positive_int, default=1024)
    parser.add_argument("--tensor", type=positive_int, default=16, help="size of each tensor in MB")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.tensor > options.megabytes:
        parser.error(f"--tensor {options.tensor} is more than --megabytes {options.megabytes}")
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        make_model(home / "small", 1, 1)
        make_model(home / "model", options.megabytes, options.tensor)
        results = {}
        for way, code in (("memopt convert", MEMOPT), ("pyarrow ParquetWriter", PYARROW)):
            key = way.split()[0]
            paths = [home / "small", home / "model", home / f"{key}-small", home / f"{key}-model"]
            done = subprocess.run(
                [sys.executable, "-c", code + MEASURE, *map(str, paths)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            results[way] = json.loads(done.stdout)
    if options.json:
        print(json.dumps({"model_mb": options.megabytes, "tensor_mb": options.tensor, **results}))
        return
    print(f"model {options.megabytes} MB, largest tensor {options.tensor} MB")
    print(f"{'way':24}{'peak rise MB':>14}{'x largest':>11}{'seconds':>9}")
    for way, r in results.items():
        print(f"{way:24}{r['rise']:14.1f}{r['rise'] / options.tensor:11.2f}{r['seconds']:9.1f}")


if __name__ == "__main__":
    run_main(main)
