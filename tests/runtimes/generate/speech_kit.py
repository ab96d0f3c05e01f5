"""A small random Whisper of two-second windows, with a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.runtimes.generate.pair_kit import scatter

RATE, SECONDS = 16_000, 2
END, START = 256, 257
LANGUAGES = {"<|en|>": 258, "<|de|>": 259}
TASKS = {"translate": 260, "transcribe": 261}
WITHOUT = 262
MARKS = WITHOUT + 1
WORDS = MARKS + SECONDS * 50 + 1


def write(folder: Path) -> Any:
    """Write a Whisper with tokenizer and feature extractor; return it."""
    torch.manual_seed(5)
    config = transformers.WhisperConfig(
        vocab_size=WORDS,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=SECONDS * 50,
        max_target_positions=40,
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=START,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    scatter(model)
    asked = {
        "lang_to_id": LANGUAGES,
        "task_to_id": TASKS,
        "no_timestamps_token_id": WITHOUT,
        "is_multilingual": True,
        "suppress_tokens": [1, 2, 7, START, *LANGUAGES.values(), *TASKS.values()],
        "begin_suppress_tokens": [32, END],
        "max_initial_timestamp_index": 20,
        "forced_decoder_ids": [[1, None], [2, TASKS["transcribe"]]],
        "max_length": 40,
    }
    for key, value in asked.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=SECONDS)
    extractor.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, Whisper's special tokens behind them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    named = ["<|endoftext|>", "<|startoftranscript|>", *LANGUAGES]
    named += [*(f"<|{name}|>" for name in TASKS), "<|notimestamps|>"]
    marks = [f"<|{number * 0.02:.2f}|>" for number in range(SECONDS * 50 + 1)]
    vocabulary = {word: number for number, word in enumerate([*alphabet, *named, *marks])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(named)
    tokenizer.add_tokens(marks)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def sound(seconds: float, seed: int = 0) -> Any:
    """Return float32 samples of some tones that come and go."""
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    wave = sum(np.sin(time * f * 6.28) * np.sin(time * 2 + f) for f in random.uniform(90, 3000, 5))
    return (np.asarray(wave) / 5 + random.normal(0, 0.02, len(time))).astype(np.float32)


def heard(model: Any, folder: Path, wave: Any, **options: Any) -> tuple[list[Any], list[Any]]:
    """Return transformers' tokens of the whole, and its segments as (start, end, tokens)."""
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    long = len(wave) > SECONDS * RATE
    more: Any = {"truncation": False, "padding": "longest"} if long else {}
    given = extractor(wave, sampling_rate=RATE, return_tensors="pt", **more)
    with torch.no_grad():
        found = model.generate(
            given.input_features, return_segments=True, do_sample=False, num_beams=1, **options
        )
    segments = [
        (float(s["start"]), float(s["end"]), s["tokens"].tolist()) for s in found["segments"][0]
    ]
    tokens = [t for t in found["sequences"][0].tolist() if t != END]
    return tokens, segments
