"""Perplexity of a small language model at 8, 4 and 2 bits, by rounding and by GPTQ.

    python benchmarks/language.py [--work .cache/tests] [--json]

Trains a GPT-2 of half a million weights on the sentences of this repository (half a minute, once),
keeps every fourth sentence for calibration and validation, and quantizes it with every width and
algorithm. ``tests/quantization/test_language.py`` holds the same table to its limits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from command_line import run_main
from rich.console import Console
from rich.table import Table

from memopt.bundle import MANIFEST, open_bundle
from memopt.exporters.base import export
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe
from memopt.weights.convert import convert

ROOT = Path(__file__).parent.parent
# Steps and sizes: some 35 s on one core, far enough down the loss curve that the weights have
# structure which careless rounding destroys (perplexity about 31 from 512; after 300 steps it is
# 52, and rounding to four bits changes less than chance does).
STEPS, BATCH, LENGTH, VOCABULARY = 900, 12, 48, 512
WIDTH, LAYERS, HEADS = 96, 3, 4
# One scale per row of 96 inputs: in blocks of 32 four bits cost next to nothing either way.
BLOCK = 128
WIDTHS = (
    ("int8", "rtn"),
    ("int4", "rtn"),
    ("int4", "gptq"),
    ("int2", "rtn"),
    ("int2", "gptq"),
)


def corpus() -> list[str]:
    """Return the sentences of the package's documentation and docstrings, in a fixed order."""
    texts = [p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").rglob("*.md"))]
    for source in sorted((ROOT / "memopt").rglob("*.py")):
        texts += re.findall(r'"""(.*?)"""', source.read_text(encoding="utf-8"), re.DOTALL)
    lines = [" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n|\. ", text)]
    return list(dict.fromkeys(line for line in lines if 40 <= len(line) <= 400))


def train(folder: Path, texts: list[str]) -> None:
    """Train and save a GPT-2 with its tokenizer as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<end>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special)
    )
    stream = [token for text in texts for token in [0, *tokenizer.encode(text).ids]]
    # More threads than cores free make tiny products slower, not faster.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        architectures=["GPT2LMHeadModel"],
    )
    model = GPT2LMHeadModel(config)
    data = torch.tensor(stream)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(0, len(data) - LENGTH - 1, (BATCH,), generator=generator)
        batch = torch.stack([data[s : s + LENGTH] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128}
    special_names = {"bos_token": "<end>", "eos_token": "<end>", "pad_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | special_names))


def language_bundle(home: Path) -> tuple[Path, Path]:
    """Return (bundle, text file the model was not trained on), trained once per corpus and code."""
    texts = corpus()
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder, held = home / f"language-{key}", home / f"language-{key}.txt"
    if not (folder / MANIFEST).is_file():
        for old in home.glob("language-*"):
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()
        source, building = home / "language-source", home / "language-building"
        source.mkdir(parents=True)
        train(source, [text for i, text in enumerate(texts) if i % 4])
        held.write_text("\n".join(texts[::4]) + "\n", encoding="utf-8")
        convert(str(source), building)
        export(open_bundle(building), format="onnx")
        building.rename(folder)
        shutil.rmtree(source)
    return folder, held


def measure(home: Path) -> list[dict[str, Any]]:
    """Return one row per variant: its name, perplexity, increase over float, share of the size."""
    trained, texts = language_bundle(home)
    with tempfile.TemporaryDirectory(prefix="memopt-language-") as temporary:
        folder = Path(temporary) / "model"
        shutil.copytree(trained, folder)
        samples = Samples(calibration=texts, samples=300, validation_samples=400)
        rows: list[dict[str, Any]] = []
        for weights, algorithm in WIDTHS:
            fields = {"weight_type": weights, "algorithm": algorithm, "group_size": BLOCK}
            recipe = Recipe.from_dict({"method": "weight-only", **fields})
            result = quantize(folder, samples, recipe, keep_failing=True)
            proof = result.validation
            if not rows:
                rows.append({"weights": "float", "perplexity": proof.perplexity_float})
            rows.append(
                {
                    "weights": f"{weights} {algorithm}",
                    "perplexity": proof.perplexity,
                    "increase": proof.perplexity_increase,
                    "of_float": result.bytes / result.float_bytes,
                    "passed": result.passed,
                }
            )
    return rows


def main() -> None:
    """Train where needed, quantize and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "tests")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.work)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("weights", "perplexity", "increase", "file, of float", "gate (+15 %)")
    for row in rows:
        rest = ("", "", "")
        if "increase" in row:
            verdict = "passed" if row["passed"] else "failed"
            rest = (f"{row['increase']:+.2%}", f"{row['of_float']:.0%}", verdict)
        table.add_row(row["weights"], f"{row['perplexity']:.3f}", *rest)
    Console(width=100).print(table)


if __name__ == "__main__":
    run_main(main)
