"""Small random models of encoder and decoder, with a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

PAD, END, BEGIN = 0, 1, 2
WORDS = 3 + 256
_BART: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 96,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}
# Class, its config, the config's settings, and what generation_config.json says beside it.
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": WORDS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "pad_token_id": PAD,
            "eos_token_id": END,
            "decoder_start_token_id": PAD,
        },
        {},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**_BART, "decoder_start_token_id": END},
        {
            "forced_bos_token_id": BEGIN,
            "forced_eos_token_id": END,
            "no_repeat_ngram_size": 3,
            "min_length": 12,
        },
    ),
    "marian": (
        "MarianMTModel",
        "MarianConfig",
        {**_BART, "decoder_start_token_id": PAD, "bos_token_id": None},
        {
            "forced_eos_token_id": END,
            "bad_words_ids": [[PAD], [70, 71]],
            "repetition_penalty": 1.3,
            "num_beams": 6,
        },
    ),
}


def write(folder: Path, kind: str) -> Any:
    """Write a model and its tokenizer; return it."""
    name, config, settings, asked = MODELS[kind]
    torch.manual_seed(3)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    scatter(model)
    for key, value in asked.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    # Marian's sines of positions are not saved: read anew they are sines.
    return getattr(transformers, name).from_pretrained(folder).eval()


def scatter(model: Any, width: float = 1.5) -> None:
    """Give a model weights with which it does not say one word again and again."""
    with torch.no_grad():
        for values in model.parameters():
            if values.ndim >= 2:
                values.normal_(0.0, width * (values.shape[0] / values.numel()) ** 0.5)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are bytes; a text ends with END."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "</s>", "<s>"]
    vocabulary = {letter: number for number, letter in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", END)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def greedy(model: Any, sources: list[list[int]], count: int) -> list[list[int]]:
    """Return what transformers makes of sources in one padded batch, without their ends."""
    width = max(map(len, sources))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in sources])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sources])
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, num_beams=1
        )
    rows = []
    for row in found[:, 1:].tolist():
        rows.append(row[: row.index(END)] if END in row else row)
    return rows
