"""Perplexity of a small language model, trained here on the repository's own text, once."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from memopt.bundle import open_bundle
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent
# Steps and sizes: some 15 s on two cores, far enough down the loss curve that the weights have
# structure which careless rounding destroys (perplexity about 10 from 512).
STEPS, BATCH, LENGTH, VOCABULARY = 300, 12, 48, 512
WIDTH, LAYERS, HEADS = 96, 3, 4


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
    from memopt.bundle import MANIFEST, open_bundle
    from memopt.exporters.base import export
    from memopt.weights.convert import convert

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


@pytest.fixture(scope="module")
def perplexities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Perplexity by name: float, int8, and int4 and int2 by rounding and by GPTQ."""
    trained, texts = language_bundle(ROOT / ".cache" / "tests")
    folder = tmp_path_factory.mktemp("language") / "model"
    shutil.copytree(trained, folder)
    bundle = open_bundle(folder)
    samples = Samples(calibration=texts, samples=100, validation_samples=100)
    found: dict[str, float] = {}
    for weights, algorithm in (
        ("int8", "rtn"),
        ("int4", "rtn"),
        ("int4", "gptq"),
        ("int2", "rtn"),
        ("int2", "gptq"),
    ):
        recipe = Recipe(
            method="weight-only", weight_type=weights, algorithm=algorithm, group_size=32
        )
        proof = quantize(bundle, samples, recipe, keep_failing=True).validation
        assert proof.perplexity is not None
        assert proof.perplexity_float is not None
        found["float"] = proof.perplexity_float
        found[f"{weights} {algorithm}"] = proof.perplexity
    assert not open_bundle(folder).variant("onnx-int2-weight-only").passed
    return found


def test_the_model_learned_something(perplexities: dict[str, float]) -> None:
    """The float model is far better than guessing among 512 tokens."""
    assert perplexities["float"] < 100


def test_int8_costs_less_than_one_percent(perplexities: dict[str, float]) -> None:
    """int8 weights raise perplexity by less than 1 %."""
    assert perplexities["int8 rtn"] < 1.01 * perplexities["float"]


@pytest.mark.parametrize("weights", ["int4", "int2"])
def test_gptq_beats_rounding(perplexities: dict[str, float], weights: str) -> None:
    """GPTQ loses less than rounding to nearest at four and at two bits."""
    assert perplexities[f"{weights} gptq"] < perplexities[f"{weights} rtn"]
