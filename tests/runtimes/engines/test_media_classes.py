"""Classifier on pictures and sounds: the labels and scores of transformers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memopt import Classifier
from memopt.errors import InputError
from memopt.exporters.base import export
from memopt.weights.convert import convert
from tests.parameters import mostly_slow

_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 4,
}
_CONVOLUTIONS: dict[str, Any] = {
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 8, 4],
    "conv_stride": [5, 8, 4],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
}


def _vit() -> Any:
    import transformers

    config = transformers.ViTConfig(**_SIZE, image_size=32, patch_size=8)
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    return transformers.ViTForImageClassification(config), processor


def _resnet() -> Any:
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    processor = transformers.ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875)
    return transformers.ResNetForImageClassification(config), processor


def _wav2vec2() -> Any:
    import transformers

    config = transformers.Wav2Vec2Config(**_SIZE, **_CONVOLUTIONS)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    return transformers.Wav2Vec2ForSequenceClassification(config), extractor


def _whisper() -> Any:
    import transformers

    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_source_positions=100,
        classifier_proj_size=16,
        num_labels=4,
    )
    extractor = transformers.WhisperFeatureExtractor(chunk_length=2)
    return transformers.WhisperForAudioClassification(config), extractor


def _ast() -> Any:
    import transformers

    config = transformers.ASTConfig(**_SIZE, max_length=64, num_mel_bins=32)
    extractor = transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=32)
    return transformers.ASTForAudioClassification(config), extractor


_MODELS: dict[str, Callable[[], Any]] = {
    "vit": _vit,
    "resnet": _resnet,
    "wav2vec2": _wav2vec2,
    "whisper": _whisper,
    "ast": _ast,
}
_PICTURES = ("vit", "resnet")


def _inputs(name: str) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    if name in _PICTURES:
        sizes = ((32, 32), (50, 40), (1, 1))
        return [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    lengths = (8_000, 16_000, 12_345)
    return [generator.normal(0, 0.1, length).astype(np.float32) for length in lengths]


@pytest.mark.parametrize("name", mostly_slow(_MODELS, "vit", "whisper"))
def test_scores_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Of each input alone, through its own processor; labels best first."""
    import torch
    from PIL import Image

    torch.manual_seed(0)
    model, processor = _MODELS[name]()
    model.eval()
    with torch.no_grad():
        for values in model.parameters():
            if values.ndim >= 2:
                values.normal_(0.0, (values.shape[0] / values.numel()) ** 0.5)
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    export(convert(tmp_path / "source", tmp_path / "bundle"), fused=False)
    inputs = _inputs(name)
    with Classifier(tmp_path / "bundle", "cpu", strict=True) as engine:
        scores = engine.scores(inputs)
        assert scores.shape == (len(inputs), 4)
        for item, row in zip(inputs, scores, strict=True):
            if name in _PICTURES:
                feeds = processor(Image.fromarray(item), return_tensors="pt")
            else:
                feeds = processor(item, sampling_rate=16_000, return_tensors="pt")
            with torch.no_grad():
                wanted = model(**feeds).logits.softmax(dim=-1)[0].numpy()
            np.testing.assert_allclose(row, wanted, atol=1e-4)
        best = engine.classify(inputs[:1], top=1)[0]
        assert best.label == engine.labels[int(scores[0].argmax())]
        with pytest.raises(InputError, match="input 0"):
            engine.classify([np.zeros((0, 3), np.uint8) if name in _PICTURES else np.zeros(0)])
