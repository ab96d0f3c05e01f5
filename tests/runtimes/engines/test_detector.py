"""Detector: the detections of transformers' processors, for every picture as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memopt.bundle import Bundle
from memopt.errors import ConfigurationError, InputError
from memopt.exporters.base import export
from memopt.runtimes.engines.detector import Detector
from memopt.weights.convert import convert
from tests.parameters import mostly_slow

# Width and height apart, landscape and portrait, one smaller than the model wants.
_SIZES = ((60, 90), (120, 70), (33, 33))
_RESNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
_SMALL: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 7,
    "num_labels": 3,
}
_EDGES = {"shortest_edge": 64, "longest_edge": 96}


def _detr() -> Any:
    import transformers

    backbone = transformers.ResNetConfig(**_RESNET, out_features=["stage4"])
    config = transformers.DetrConfig(**_SMALL, use_timm_backbone=False, backbone_config=backbone)
    return transformers.DetrForObjectDetection(config), transformers.DetrImageProcessorPil(
        size=_EDGES
    )


def _conditional() -> Any:
    import transformers

    backbone = transformers.ResNetConfig(**_RESNET, out_features=["stage4"])
    config = transformers.ConditionalDetrConfig(
        **_SMALL, use_timm_backbone=False, backbone_config=backbone
    )
    return (
        transformers.ConditionalDetrForObjectDetection(config),
        transformers.ConditionalDetrImageProcessorPil(size=_EDGES),
    )


def _yolos() -> Any:
    import transformers

    config = transformers.YolosConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[64, 96],
        num_detection_tokens=7,
        num_labels=3,
    )
    processor = transformers.YolosImageProcessorPil(size=_EDGES)
    return transformers.YolosForObjectDetection(config), processor


def _rt_detr() -> Any:
    import transformers

    config = transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(
            **{
                **_RESNET,
                "hidden_sizes": [8, 8, 16, 16],
                "out_features": ["stage2", "stage3", "stage4"],
            }
        ),
        encoder_in_channels=[8, 16, 16],
        encoder_hidden_dim=32,
        d_model=32,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_in_channels=[32, 32, 32],
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        num_queries=7,
        num_denoising=0,
        num_labels=3,
        anchor_image_size=None,
    )
    processor = transformers.RTDetrImageProcessorPil(size={"height": 64, "width": 64})
    return transformers.RTDetrForObjectDetection(config), processor


_MODELS = {"detr": _detr, "conditional": _conditional, "yolos": _yolos, "rt_detr": _rt_detr}


def _pictures() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), np.uint8) for size in _SIZES]


def _built(name: str, folder: Path) -> tuple[Bundle, Any, Any]:
    """Return a bundle of a random detector with ONNX, the model and its processor."""
    import torch

    torch.manual_seed(0)
    model, processor = _MODELS[name]()
    model.eval()
    with torch.no_grad():
        for values in model.parameters():
            if values.ndim >= 2 and values.numel():
                # He et al. 2015: of the same size behind a ReLU. With biases beside it the places
                # of a random model are nearly alike, and rounding would choose among them.
                values.normal_(0.0, (2 * values.shape[0] / values.numel()) ** 0.5)
    model.save_pretrained(folder / "source")
    processor.save_pretrained(folder / "source")
    bundle = convert(folder / "source", folder / "bundle")
    export(bundle, fused=False)
    return bundle, model, processor


def _expected(model: Any, processor: Any, picture: np.ndarray, threshold: float) -> Any:
    import torch
    from PIL import Image

    feeds = processor(Image.fromarray(picture), return_tensors="pt")
    with torch.no_grad():
        answer = model(**feeds)
    sizes = [picture.shape[:2]]
    return processor.post_process_object_detection(answer, threshold, target_sizes=sizes)[0]


@pytest.mark.parametrize("name", mostly_slow(_MODELS, "yolos"))
def test_detections_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Labels, scores and boxes in pixels, of pictures of several shapes in one call."""
    _, model, processor = _built(name, tmp_path)
    with Detector(tmp_path / "bundle", "cpu", strict=True) as engine:
        for threshold in (0.5, 0.1):
            found = engine.detect(_pictures(), threshold=threshold)
            for picture, things in zip(_pictures(), found, strict=True):
                wanted = _expected(model, processor, picture, threshold)
                names = [model.config.id2label[int(i)] for i in wanted["labels"]]
                assert [thing.label for thing in things] == names
                scores = [thing.score for thing in things]
                np.testing.assert_allclose(scores, wanted["scores"].numpy(), atol=1e-5)
                boxes = np.array([thing.box for thing in things]).reshape(-1, 4)
                np.testing.assert_allclose(boxes, wanted["boxes"].numpy(), atol=1e-3)
        assert any(found)  # at the lower threshold there is something to compare
        assert engine.detect([]) == []
        with pytest.raises(ConfigurationError, match="threshold is 2"):
            engine.detect(_pictures(), threshold=2)
        with pytest.raises(InputError, match="input 1"):
            engine.detect([_pictures()[0], tmp_path / "none.png"])
