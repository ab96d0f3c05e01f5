"""ZeroShotClassifier: logits_per_image of transformers, with both towers from one bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memopt import ArrowEngine, ZeroShotClassifier, open_bundle
from memopt.errors import BundleError, InputError
from memopt.exporters.base import export
from memopt.weights.convert import convert
from tests.parameters import mostly_slow

_WORDS = ("this", "is", "a", "photo", "of", "cat", "dog", "house", "very", "large")
_TEXT: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
_PICTURE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_LABELS = ["a cat", "a very large dog", "house"]


def _clip() -> Any:
    import transformers

    text = {**_TEXT, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=_PICTURE, projection_dim=24)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    return transformers.CLIPModel(config), processor


def _siglip() -> Any:
    import transformers

    text = {**_TEXT, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 1}
    config = transformers.SiglipConfig(text_config=text, vision_config=_PICTURE)
    processor = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return transformers.SiglipModel(config), processor


_MODELS = {"clip": _clip, "siglip": _siglip}


def _tokenizer(name: str, folder: Path) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pad = 1 if name == "siglip" else 0
    vocabulary = {"[PAD]": pad, "[UNK]": 1 - pad, "[BOS]": 2, "[EOS]": 3}
    vocabulary |= {word: 4 + i for i, word in enumerate(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    made.save_pretrained(folder)
    return made


def _seed(model: Any) -> None:
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for part, values in model.named_parameters():
            if values.ndim >= 2:
                values.normal_(0.0, (values.shape[0] / values.numel()) ** 0.5)
            elif part == "logit_bias":
                values.fill_(-1.5)
            elif part == "logit_scale":
                values.fill_(1.2)


@pytest.mark.parametrize("name", mostly_slow(_MODELS, "clip"))
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Of pictures and labels of several sizes and lengths, scale and bias included."""
    import torch
    from PIL import Image

    model, processor = _MODELS[name]()
    _seed(model.eval())
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    tokenizer = _tokenizer(name, tmp_path / "source")
    variants = export(convert(tmp_path / "source", tmp_path / "bundle"), fused=False)
    assert [(v.name, v.task) for v in variants] == [
        ("onnx-fp32", ""),
        ("onnx-fp32-text", "embedding"),
    ]
    generator = np.random.default_rng(0)
    sizes = ((32, 32), (50, 40))
    pictures = [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    texts = [f"This is a photo of {label}." for label in _LABELS]
    padding: Any = "max_length" if name == "siglip" else True
    words = tokenizer(texts, padding=padding, max_length=16, truncation=True, return_tensors="pt")
    words.pop("token_type_ids", None)
    if name == "siglip":
        words.pop("attention_mask")
    pixels = processor([Image.fromarray(p) for p in pictures], return_tensors="pt")
    with torch.no_grad():
        wanted = model(**words, **pixels).logits_per_image
    with ZeroShotClassifier(tmp_path / "bundle", "cpu", strict=True) as engine:
        np.testing.assert_allclose(engine.logits(pictures, texts), wanted.numpy(), atol=1e-4)
        scores = wanted.sigmoid() if name == "siglip" else wanted.softmax(dim=1)
        for found, row in zip(engine.classify(pictures, _LABELS), scores, strict=True):
            order = row.argsort(descending=True)
            assert list(found.labels) == [_LABELS[i] for i in order]
            np.testing.assert_allclose(found.scores, row[order].numpy(), atol=1e-4)
        assert engine.classify([], _LABELS) == []
        with pytest.raises(InputError, match="no labels"):
            engine.classify(pictures, [])
    with ArrowEngine(tmp_path / "bundle", "cpu", task="embedding") as engine:
        alone, together = engine.encode("a cat"), engine.encode(["a cat", "a very large dog"])
        np.testing.assert_allclose(alone, together[0], atol=1e-5)
    with pytest.raises(BundleError, match="no tower for audio-embedding"):
        ArrowEngine(tmp_path / "bundle", task="audio-embedding")


def test_a_bundle_of_one_tower_is_refused(minilm: Any) -> None:
    """The error says what to convert instead."""
    with pytest.raises(BundleError, match="no second tower"):
        ZeroShotClassifier(open_bundle(minilm.path))
