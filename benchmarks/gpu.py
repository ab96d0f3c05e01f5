"""Encoders on an NVIDIA GPU: memopt beside transformers and sentence-transformers, in one run.

    python benchmarks/gpu.py [--models minilm,bert-base] [--build-limit 150] [--save gpu.json]

Runs alone: weights are seeded noise of the real configurations (all-MiniLM-L6-v2, bert-base), the
tokenizer is trained on the seeded texts, nothing is downloaded. Compute alone is 128 rows of 128
tokens that lie on the card; end to end is text to vectors in numpy. All in half precision, rounds
in turn, medians. Needs torch with CUDA and transformers; sentence-transformers and onnxruntime-gpu
are measured where they are installed. What is not built within --build-limit seconds is left
out, and said so; each table is printed, and saved, as soon as it is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from command_line import positive_float, run_main
from make_models import write_tokenizer
from rich.console import Console
from rich.table import Table

from memopt.benchmark.record import versions
from memopt.benchmark.workload import default_inputs
from memopt.bundle import open_bundle
from memopt.exporters.base import export
from memopt.registry import check_names
from memopt.runtimes.aoti import Package
from memopt.runtimes.base import Placement, Settings
from memopt.runtimes.engine import ArrowEngine
from memopt.runtimes.onnx import OnnxBackend
from memopt.runtimes.providers import installed
from memopt.weights.convert import convert

CONFIGS = {
    "minilm": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "bert-base": {},
}
ROWS, TOKENS = 128, 128
SHORT, LONG, LONG_TOKENS = 32_768, 4_096, 340
VARIANTS = {"aoti": ("torch-aoti-fp16", "torch-aoti"), "cuda": ("onnx-fp16", "onnx")}
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: ``per_second`` inputs, or ``ms`` for one."""

    model: str
    what: str
    contender: str
    per_second: float
    ms: float
    cosine: float | None = None  # the least, to torch in float32


def texts(count: int, words: int = 0) -> list[str]:
    """Return seeded sentences, or texts of about so many words."""
    from types import SimpleNamespace

    many = count if not words else count * words // 10
    sentences = default_inputs(SimpleNamespace(modality="text"), many, seed=1)  # type: ignore[arg-type]
    if not words:
        return sentences
    step = many // count
    return [" ".join(sentences[i * step : (i + 1) * step]) for i in range(count)]


def make_folder(name: str, folder: Path) -> Path:
    """Write a Hugging Face folder of a model with seeded weights, and its tokenizer."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**CONFIGS[name]))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def build(name: str, device: str, folder: Path) -> None:
    """Convert one model, or export it for one provider; each in a process of its own."""
    if device == "convert":
        convert(make_folder(name, folder / f"{name}-hf"), folder / name)
        return
    _, format_ = VARIANTS[device]
    export(open_bundle(folder / name), format=format_, precision="fp16")


def is_built(name: str, device: str, folder: Path) -> bool:
    """Return whether a step was done before, in a folder that is kept."""
    if device == "convert":
        return (folder / name).is_dir()
    return VARIANTS[device][0] in open_bundle(folder / name).manifest.variants


def build_all(names: list[str], folder: Path, limit: float) -> None:
    """Build all models side by side; say how long each step took, and which went past the limit.

    Raises:
        SystemExit: a step failed.
    """
    for device in ("convert", *(device for device in VARIANTS if installed(device))):
        begin = time.perf_counter()
        command = [sys.executable, __file__, "--folder", str(folder), "--build"]
        steps = {
            name: subprocess.Popen([*command, f"{name}:{device}"], start_new_session=True)
            for name in names
            if not is_built(name, device, folder)
        }
        for name, step in steps.items():
            try:
                if step.wait(max(0.0, begin + limit - time.perf_counter())):
                    raise SystemExit(f"{name}: {device} could not be built")
                print(f"{name}: {device} built in {time.perf_counter() - begin:.0f} s", flush=True)
            except subprocess.TimeoutExpired:
                os.killpg(step.pid, signal.SIGKILL)  # a compiler has processes of its own
                step.wait()
                print(f"{name}: {device} not built in {limit:.0f} s: left out", flush=True)


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the seconds of one run on the GPU, the median of five times ``repeats``."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    measured = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        measured.append(begin.elapsed_time(end) / repeats / 1e3)
    return statistics.median(measured)


def compute_alone(name: str, folder: Path) -> list[Row]:
    """Measure the model and mean pooling alone, the inputs on the card."""
    bundle = open_bundle(folder / name)
    ids = np.random.default_rng(0).integers(5, 500, (ROWS, TOKENS))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed["token_type_ids"] = np.zeros_like(ids)
    placed = {key: torch.from_numpy(value).cuda() for key, value in feed.items()}
    model = transformers.AutoModel.from_pretrained(folder / f"{name}-hf").eval().cuda()

    def pooled(module: Any) -> Any:
        hidden = module(**placed).last_hidden_state.float()
        return torch.nn.functional.normalize(hidden.mean(1), dim=-1)

    def unit(vectors: Any) -> Any:
        return torch.nn.functional.normalize(torch.as_tensor(vectors).cuda().float(), dim=-1)

    runs: dict[str, Callable[[], Any]] = {}
    with torch.inference_mode():
        wanted = pooled(model)
        model.half()
        compiled = torch.compile(model)
        runs["torch fp16"] = lambda: pooled(model)
        runs["torch.compile fp16"] = lambda: pooled(compiled)
        there = bundle.manifest.variants
        if compiled_variant := there.get(VARIANTS["aoti"][0]):
            package = Package(bundle.file(compiled_variant), compiled_variant.options, runners=1)
            inputs = package.place(feed)
            runs["memopt torch-aoti-fp16"] = lambda: package.compute(inputs)
        backend = None
        if onnx_variant := there.get(VARIANTS["cuda"][0]):
            backend = OnnxBackend(bundle, Placement("cuda", onnx_variant), Settings())
            runs["memopt onnx-fp16"] = lambda: backend.run(feed)  # with its copies
        found = []
        for label, run in runs.items():
            seconds = median_seconds(run, 10)
            cosine = float((unit(run()) * wanted).sum(-1).min())
            found.append(Row(name, "compute alone", label, ROWS / seconds, seconds * 1e3, cosine))
    if backend is not None:
        backend.close()
    return found


def end_to_end(name: str, folder: Path) -> list[Row]:
    """Measure texts to vectors: many short ones, many long ones, one at a time."""
    bundle = open_bundle(folder / name)
    contenders: dict[str, Callable[[list[str]], Any]] = {}
    engines = []
    for device, (variant, _) in VARIANTS.items():
        if variant in bundle.manifest.variants:
            engine = ArrowEngine(bundle, device=device, variant=variant, strict=True)
            engines.append(engine)
            contenders[f"memopt {variant}"] = engine.encode
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        print("sentence-transformers is not installed: not measured")
    else:
        peer = SentenceTransformer(str(folder / f"{name}-hf"), device="cuda").half()
        peer.max_seq_length = 512
        contenders["sentence-transformers fp16"] = lambda items: peer.encode(
            items, batch_size=256, normalize_embeddings=True, show_progress_bar=False
        )
    work = {
        "short texts": texts(SHORT),
        f"texts of {LONG_TOKENS} tokens": texts(LONG, LONG_TOKENS),
    }
    found = []
    for what, items in work.items():
        rounds: dict[str, list[float]] = {label: [] for label in contenders}
        vectors: dict[str, Any] = {}
        for label, encode in contenders.items():
            vectors[label] = encode(items[:1024])
        for _ in range(ROUNDS):
            for label, encode in contenders.items():
                begin = time.perf_counter()
                encode(items)
                rounds[label].append(time.perf_counter() - begin)
        peer_vectors = vectors.get("sentence-transformers fp16")
        for label, seconds in rounds.items():
            cosine = None
            if peer_vectors is not None:
                cosine = float((vectors[label] * peer_vectors).sum(-1).min())
            took = statistics.median(seconds)
            found.append(Row(name, what, label, len(items) / took, took * 1e3, cosine))
    for label, encode in contenders.items():
        latencies = []
        for text in work["short texts"][:120]:
            begin = time.perf_counter()
            encode([text])
            latencies.append(time.perf_counter() - begin)
        one = statistics.median(latencies[20:])
        found.append(Row(name, "one short text", label, 1 / one, one * 1e3))
    for engine in engines:
        for event in engine.events:
            print(f"{name}: {event}")
        engine.close()
    return found


def table(rows: list[Row]) -> Table:
    """Return the measurements, each beside the peer of its kind."""
    made = Table(title=torch.cuda.get_device_name())
    for column in ("model", "what", "contender", "inputs/s", "ms", "x peer", "min cosine"):
        made.add_column(
            column, justify="left" if column in ("model", "what", "contender") else "right"
        )
    for row in rows:
        peer = "torch fp16" if row.what == "compute alone" else "sentence-transformers fp16"
        same = [r for r in rows if (r.model, r.what, r.contender) == (row.model, row.what, peer)]
        times = f"{row.per_second / same[0].per_second:.2f}" if same else "-"
        cosine = "-" if row.cosine is None else f"{row.cosine:.7f}"
        made.add_row(
            row.model, row.what, row.contender, f"{row.per_second:,.0f}", f"{row.ms:.2f}",
            times, cosine,
        )  # fmt: skip
    return made


def main() -> None:
    """Build the models side by side, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(CONFIGS))
    parser.add_argument("--folder", type=Path, help="where models are built, and kept")
    parser.add_argument(
        "--build-limit", type=positive_float, default=150, help="seconds a step may take"
    )
    parser.add_argument("--save", type=Path, help="write the rows as JSON")
    parser.add_argument("--build", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.build:
        build(*given.build.split(":"), given.folder)
        return
    names = given.models.split(",")
    check_names("model", names, CONFIGS)
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here: nothing to measure")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        build_all(names, folder, given.build_limit)
        rows: list[Row] = []
        for name in names:
            for measure in (compute_alone, end_to_end):
                measured = measure(name, folder)
                Console(width=140).print(table(measured))
                rows += measured
                if given.save:
                    card = {"card": torch.cuda.get_device_name(), **versions()}
                    record = {**card, "rows": [asdict(row) for row in rows]}
                    text = json.dumps(record, indent=1) + "\n"
                    given.save.write_text(text, encoding="utf-8")
                torch._dynamo.reset()
                gc.collect()
                torch.cuda.empty_cache()


if __name__ == "__main__":
    run_main(main)
