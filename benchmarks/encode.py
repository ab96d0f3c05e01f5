"""Sentences per second and single-sentence latency, beside sentence-transformers, in one run.

    python benchmarks/encode.py [--peers] [--rounds 7] [--bundle models/minilm]

Uses the 3,000 sentences of ../shared/data/stsb-en-dev.csv when they are there, else seeded ones.
Every contender is a process with all cores; rounds alternate; ratios are of paired rounds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from command_line import positive_int, run_main
from peak import peaks
from rich.console import Console
from tokenizers import Tokenizer

from memopt.benchmark import report
from memopt.benchmark.bench import peer_model
from memopt.benchmark.peers import PEERS, Contender, peer_contenders, peer_python
from memopt.benchmark.record import ratio
from memopt.benchmark.runner import run
from memopt.benchmark.workload import default_inputs, read_inputs
from memopt.bundle import Bundle, Variant, open_bundle
from memopt.exporters.base import export
from memopt.runtimes.cpu import BF16, cpu_features
from memopt.weights.convert import resolve
from memopt.weights.reader import WeightLoader

DATA = Path(__file__).parents[2] / "shared" / "data" / "stsb-en-dev.csv"


def prepared(name: str) -> Bundle:
    """Open the bundle, with the float variants exported."""
    bundle = resolve(name)
    for wanted, format_, precision in (
        ("onnx-fp32", "onnx", "fp32"),
        ("openvino-fp32", "openvino", "fp32"),
        ("openvino-bf16", "openvino", "bf16"),
    ):
        if wanted not in open_bundle(bundle.path).manifest.variants:
            export(open_bundle(bundle.path), format=format_, precision=precision)
    return open_bundle(bundle.path)


def arithmetic(variant: Variant) -> str:
    """Return the precision, of those of peak.py, in which a variant multiplies."""
    if variant.precision == "int8" and "weight" not in variant.method:
        return "int8"
    # Weights alone in int8 are made float again first. The runtime asks the processor as well.
    half = variant.options.get("INFERENCE_PRECISION_HINT") == "bf16" and BF16 & cpu_features()
    return "bf16" if half else "fp32"


def share_of_peak(bundle: Bundle, variant: Variant, texts: list[str], speed: float) -> None:
    """Print how much `speed` texts per second are of the matmul speed in the variant's precision.

    Counts 2 operations per weight of a linear layer and token; attention itself, about 3 % at these
    lengths, and all that is no matmul are left out.
    """
    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    tokenizer.no_padding()
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts)) / len(texts)
    with WeightLoader(bundle.path / "weights.parquet") as weights:
        infos = [weights.info(name) for name in weights.names() if ".layer." in name]
    linear = sum(info.size for info in infos if len(info.shape) == 2)
    found = peaks()
    done = speed * tokens * 2 * linear / 1e9
    kind = arithmetic(variant)
    peak = found.pop(kind)
    print(f"  matmul           {done:,.0f} GOP/s in {kind} ({tokens:.1f} tokens a text)")
    print(f"    of {kind} peak   {done / peak:.0%} of {peak:,.0f} GOP/s")
    others = ", ".join(f"{other} {speed:,.0f}" for other, speed in found.items())
    print(f"    other peaks    {others} GOP/s")


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="minilm")
    parser.add_argument("--peers", action="store_true", help="also the packaged peers (own venv)")
    parser.add_argument("--rounds", type=positive_int, default=7)
    parser.add_argument("--count", type=positive_int, default=3000)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    bundle = prepared(options.bundle)
    texts = (
        read_inputs(DATA, "text", options.count)
        if DATA.is_file()
        else default_inputs(bundle.manifest, options.count)
    )
    python = peer_python()
    source = peer_model(bundle, python)
    names = PEERS if options.peers else ("sentence-transformers",)
    peers = peer_contenders(list(names), bundle, source, python)
    if not options.peers:
        peers = [peer for peer in peers if peer.spec.get("backend") == "torch"]
    wanted = ["onnx-fp32-fused", "openvino-fp32"]
    if BF16 & cpu_features():
        wanted.append("openvino-bf16")
    if bundle.manifest.chosen:
        wanted.append("auto")
    ours = [
        Contender(
            label=f"memopt {name}",
            spec={"kind": "memopt", "path": str(bundle.path.absolute()), "variant": name},
        )
        for name in wanted
    ]
    with Console(stderr=True).status("measuring") as status:
        records = run([*peers, *ours], texts, rounds=options.rounds, on_step=status.update)
    if options.report:
        report.write_html(records, options.report)
    if options.json:
        print(json.dumps({r.label: r.items_per_second for r in records}, indent=1))
        return
    Console(width=170).print(report.table(records))
    best_peer = max(records[: len(peers)], key=lambda r: r.items_per_second)
    best = max(records[len(peers) :], key=lambda r: r.items_per_second)
    against = ratio(best, best_peer)
    torch = records[0]
    print(f"best memopt: {best.label}, best peer: {best_peer.label}")
    print(f"  throughput ratio {against.median:.2f} [{against.low:.2f}, {against.high:.2f}]")
    print(f"  against torch    {ratio(best, torch).median:.2f}")
    print(f"  single p50       {torch.latency_ms_p50 / best.latency_ms_p50:.1f}x faster than torch")
    ran = bundle.variant(best.compared)
    share_of_peak(bundle, ran, texts, best.items_per_second)


if __name__ == "__main__":
    run_main(main)
