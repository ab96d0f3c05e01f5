"""Show that an exported bundle opens unchanged in other tools and gives equal vectors.

    python benchmarks/interop.py [models/minilm]

Opens the bundle folder itself (no conversion) in sentence-transformers with its onnx and openvino
backends, in fastembed's custom-model path, in optimum and in plain onnxruntime, the peers in an
environment of their own that the first run makes (.peers, some minutes).
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from command_line import run_main
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from memopt import ArrowEngine, Bundle, open_bundle
from memopt.benchmark.peers import Contender, peer_python
from memopt.benchmark.runner import run
from memopt.exporters.base import export
from memopt.weights.convert import resolve

TEXTS = [
    "A man with a hard hat is dancing.",
    "",
    "Über den Wolken muß die Freiheit wohl grenzenlos sein.",
    "word " * 400,
    "Two sentences. In one text!",
]
# fp32 on two runtimes: reassociated sums, nothing else.
TOLERANCE = 1e-5


def plain_onnxruntime(bundle: Bundle) -> np.ndarray:
    """Run onnx/model.onnx as its signature in docs/architecture.md says, without memopt."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        bundle.path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    names = {value.name for value in session.get_inputs()}
    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    tokenizer.enable_truncation(bundle.manifest.max_length)
    tokenizer.enable_padding()
    batch = tokenizer.encode_batch(TEXTS)
    feeds = {
        "input_ids": np.array([e.ids for e in batch]),
        "attention_mask": np.array([e.attention_mask for e in batch]),
        "token_type_ids": np.array([e.type_ids for e in batch]),
    }
    used = {name: value for name, value in feeds.items() if name in names}
    return np.asarray(session.run(["sentence_embedding"], used)[0])


def main() -> None:
    """Print one row per tool; exit 1 when a vector differs by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", default="minilm", help="bundle, or any source")
    bundle = resolve(parser.parse_args().bundle)
    for format_, wanted in (("onnx", "onnx-fp32"), ("openvino", "openvino-fp32")):
        if wanted not in open_bundle(bundle.path).manifest.variants:
            export(open_bundle(bundle.path), format=format_)
    bundle = open_bundle(bundle.path)
    python = peer_python()
    path = str(bundle.path.absolute())
    common = {"path": path, "dimension": bundle.manifest.dimension}
    peers = [
        ("sentence-transformers onnx", {"kind": "sentence-transformers", "backend": "onnx"}),
        (
            "sentence-transformers openvino",
            # By itself it computes in bf16 where the processor can: what is compared is the file.
            {
                "kind": "sentence-transformers",
                "backend": "openvino",
                "ov_config": {"INFERENCE_PRECISION_HINT": "f32"},
            },
        ),
        ("fastembed custom model", {"kind": "fastembed"}),
        ("optimum", {"kind": "optimum", "max_length": bundle.manifest.max_length}),
    ]
    rows = [("plain onnxruntime", plain_onnxruntime(bundle))]
    with ArrowEngine(bundle, variant="onnx-fp32") as engine:
        reference = engine.encode(TEXTS)
    contenders = [Contender(label=n, spec={**common, **s}, python=python) for n, s in peers]
    vectors: dict[str, np.ndarray] = {}
    run(contenders, TEXTS, rounds=1, singles=1, vectors=vectors)
    rows += list(vectors.items())
    table = Table("opened in", "max abs difference", "min cosine", "equal")
    failed = False
    for name, found in rows:
        difference = float(np.abs(found - reference).max())
        cosine = float((found * reference).sum(1).min())
        failed |= difference > TOLERANCE
        table.add_row(name, f"{difference:.1e}", f"{cosine:.7f}", str(difference <= TOLERANCE))
    Console(width=110).print(table)
    sys.exit(failed)


if __name__ == "__main__":
    run_main(main)
