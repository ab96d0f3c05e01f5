"""A GGUF file laid out as the folder of a Hugging Face model, all but its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import WeightsError
from memopt.weights.gguf.checkpoint import GgufWeight, gguf_weights
from memopt.weights.gguf.config import POOLINGS, build_config
from memopt.weights.gguf.file import GgufFile, open_gguf
from memopt.weights.gguf.tokenizer import adds, build_tokenizer
from memopt.weights.gguf.vocabulary import Vocabulary, read_vocabulary
from memopt.weights.quantized import QuantizedWeight

_TEMPLATE, _TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"


@dataclass(frozen=True, slots=True)
class GgufModel:
    """An opened GGUF file as a model of transformers: its config and where its weights are."""

    file: GgufFile
    config: Mapping[str, Any]
    weights: tuple[GgufWeight, ...]

    @property
    def known(self) -> dict[str, Any]:
        """What a bundle's manifest says that no file of the folder does."""
        architecture = self.file.architecture
        usual = 1 if architecture == "bert" else 0
        number = self.file.metadata.get(f"{architecture}.pooling_type", usual)
        if number == 0 and architecture != "bert":
            return {"task": "text-generation"}
        if number not in POOLINGS:
            raise WeightsError(
                f"{self.file.path}: {architecture}.pooling_type {number!r} is not known",
                fix=f"known: {', '.join(f'{n} ({name})' for n, name in POOLINGS.items())}",
            )
        return {"task": "embedding", "pooling": POOLINGS[number]}

    @property
    def kinds(self) -> dict[str, int]:
        """How many tensors there are of each number type."""
        names = [tensor.kind.name for tensor in self.file.tensors.values()]
        return {name: names.count(name) for name in sorted(set(names))}

    def stream(self) -> Iterator[tuple[str, QuantizedWeight | np.ndarray]]:
        """Yield each weight as the integers it is in the file, or its floats where it has none."""
        for weight in self.weights:
            integers = weight.load_quantized()
            yield weight.name, weight.load() if integers is None else integers


def open_model(path: Path) -> GgufModel:
    """Open a GGUF file and check it against what its architecture needs.

    Raises:
        WeightsError: a damaged file, or something in it that memopt does not know, by name.
    """
    file = open_gguf(path)
    config = build_config(file)
    return GgufModel(file, config, gguf_weights(file, config))


def lay_out(model: GgufModel, folder: Path) -> tuple[str, ...]:
    """Write config.json, generation_config.json, tokenizer.json and tokenizer_config.json.

    Args:
        model: opened.
        folder: is there, and empty.

    Returns:
        What a user should know, a line each.
    """
    vocabulary = read_vocabulary(model.file, model.config["vocab_size"])
    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    _write(folder / "config.json", model.config)
    _write(folder / "tokenizer_config.json", _tokenizer_config(vocabulary, model.config))
    if model.known["task"] == "text-generation":
        _write(folder / "generation_config.json", _generation(vocabulary))
    if vocabulary.model == "gpt2" and vocabulary.get("pre") in (None, "default"):
        return (
            f"{model.file.path} does not say how its tokenizer cuts words (tokenizer.ggml.pre): "
            "GPT-2's way is taken",
        )
    return ()


def _generation(vocabulary: Vocabulary) -> dict[str, Any]:
    ends = vocabulary.ends
    ids: dict[str, Any] = {
        "bos": vocabulary.special.get("bos"),
        "pad": vocabulary.special.get("pad"),
    }
    ids["eos"] = ends[0] if len(ends) == 1 else ends or None
    return {
        f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if ids[name] is not None
    }


def _tokenizer_config(vocabulary: Vocabulary, config: Mapping[str, Any]) -> dict[str, Any]:
    length = config.get("max_position_embeddings") or config.get("n_positions")
    written: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    if vocabulary.model == "bert":
        names = {"unk": "[UNK]", "pad": "[PAD]", "mask": "[MASK]", "cls": "[CLS]", "sep": "[SEP]"}
        usual = {n: token for n, token in names.items() if token in vocabulary.tokens}
        special = {n: vocabulary.token(n) or usual.get(n) for n in names}
    else:
        special = {n: vocabulary.token(n) for n in ("bos", "eos", "unk", "pad")}
        written |= {f"add_{n}_token": adds(vocabulary, n) for n in ("bos", "eos")}
        written["padding_side"] = "left"  # generating goes on at the right end
    written |= {f"{name}_token": token for name, token in special.items() if token is not None}
    template = _chat_template(vocabulary.file)
    return {**written, "chat_template": template} if template is not None else written


def _chat_template(file: GgufFile) -> Any:
    """Return the template, or a list of named ones where the file has several."""
    template = file.metadata.get(_TEMPLATE)
    named = file.metadata.get(_TEMPLATES, [])
    if not isinstance(template, str | None) or not isinstance(named, list):
        raise WeightsError(f"{file.path}: {_TEMPLATE} is {template!s:.60}, not a text")
    others = {name: file.metadata.get(f"{_TEMPLATE}.{name}") for name in named}
    texts = {"default": template, **others}
    entries = [{"name": n, "template": t} for n, t in texts.items() if isinstance(t, str)]
    return entries if len(entries) > 1 else template


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
