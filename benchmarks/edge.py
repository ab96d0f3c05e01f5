"""What `memopt[cpu]` costs a small box: disk, packages, and the time to its first vector.

    python benchmarks/edge.py [--bundle DIR]

Makes a fresh venv outside the checkout, installs memopt[cpu] there, packs the real MiniLM for it,
runs the command line and opens the engine. Ends with 1 when more than LIMIT_MB was added, or
something heavy came along. The times are printed, not judged: the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Of these 3.1 are memopt itself, and 8 what Python compiles when all of it has run.
LIMIT_MB = 196
HEAVY = {"pyarrow", "torch", "transformers", "onnx", "openvino", "pandas", "scipy", "lancedb"}
RUNS = 9
FIRST = """
import sys, time
begin = time.perf_counter()
from memopt import ArrowEngine
with ArrowEngine(sys.argv[1]) as engine:
    vector = engine.encode("a cat sleeps")
    print(time.perf_counter() - begin, len(engine.events))
"""
# The least that gives the same vector: the libraries by hand.
BY_HAND = """
import sys, time
begin = time.perf_counter()
import numpy, onnxruntime
from tokenizers import Tokenizer
words = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json").encode("a cat sleeps")
graph = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
feed = {"input_ids": words.ids, "attention_mask": words.attention_mask}
feed["token_type_ids"] = words.type_ids
graph.run(None, {i.name: numpy.array([feed[i.name]]) for i in graph.get_inputs()})
print(time.perf_counter() - begin)
"""


def disk_mb(folder: Path) -> float:
    """Return what the files of a folder take in MB (10^6 bytes), links not followed."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if not p.is_dir()) / 1e6


def run(*command: str | Path) -> str:
    """Run a command outside the checkout; end with its error when it fails."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd="/", env=clean
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def real_bundle(home: Path) -> Path:
    """Return the MiniLM bundle of `make demo` or of the tests, else make one."""
    made = [ROOT / "models" / "minilm", *sorted((ROOT / ".cache" / "tests").glob("minilm-*"))]
    found = [p for p in made if (p / "onnx" / "model_fused.onnx").is_file()]
    if found:
        return max(found, key=lambda p: p.stat().st_mtime)
    for step in (["convert", "minilm", "-o", home / "minilm"], ["export", home / "minilm"]):
        subprocess.run([sys.executable, "-m", "memopt", *map(str, step)], cwd=ROOT, check=True)
    return home / "minilm"


def main() -> None:
    """Install, measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="to pack [default: the real MiniLM]")
    parser.add_argument("--compile", action="store_true", help="leave --no-compile out")
    arguments = parser.parse_args()
    if arguments.bundle and not (arguments.bundle / "memopt.json").is_file():
        parser.error(f"no bundle at {str(arguments.bundle)!r}")
    with tempfile.TemporaryDirectory(prefix="memopt-edge-") as name:
        home = Path(name)
        venv.create(home / "venv", with_pip=True)
        python, command = (home / "venv" / "bin" / name for name in ("python", "memopt"))
        empty = disk_mb(home / "venv")
        how = [] if arguments.compile else ["--no-compile"]
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *how]
        run(*pip, "-c", ROOT / "constraints.txt", f"{ROOT}[cpu]")
        listed = run(python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check")
        packages = {p["name"]: p["version"] for p in json.loads(listed)}

        bundle, box = arguments.bundle or real_bundle(home), home / "box"
        print(run(command, "pack", bundle.absolute(), "-o", box).strip())
        run(command, "info", box, "--verify")
        (home / "texts.txt").write_text("a cat\na dog\n", encoding="utf-8")
        print(run(command, "embed", box, "-i", home / "texts.txt", "-o", home / "v.npy").strip())

        graph = next((box / "onnx").glob("*.onnx"))
        answers, plain = [], []
        for _ in range(RUNS):  # in turn, so that a slow spell of the host hits both
            answers.append(run(python, "-c", FIRST, box).split())
            plain.append(float(run(python, "-c", BY_HAND, box, graph)))
        seconds = statistics.median(float(a[0]) for a in answers)
        best = min(float(a[0]) for a in answers)
        # After everything ran: Python has compiled what it needs by now.
        added = disk_mb(home / "venv") - empty
    own = {"pip", "setuptools"}
    names = [f"{n} {v}" for n, v in packages.items() if n not in own]
    print(f"packages ({len(names)}): {', '.join(names)}")
    print(f"pip install {' '.join([*how, 'memopt[cpu]'])}: {added:.0f} MB added")
    print(
        f"import to first vector: median {seconds:.3f} s, best {best:.3f} s of {RUNS}; with "
        f"onnxruntime by hand: {statistics.median(plain):.3f} s, best {min(plain):.3f} s"
    )
    problems = [f"{n} came along" for n in packages if n in HEAVY]
    problems += ["fell back"] if any(a[1] != "0" for a in answers) else []
    if added > LIMIT_MB and not arguments.compile:
        problems.append(f"{added:.0f} MB is more than {LIMIT_MB}")
    if problems:
        sys.exit("edge: " + "; ".join(problems))


if __name__ == "__main__":
    main()
