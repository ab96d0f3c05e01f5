"""Which products of a graph are its linear layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as op
import pytest
from PIL import Image

from memopt import ArrowEngine
from memopt.exporters.base import export
from memopt.graphs.linears import openvino_linears
from memopt.graphs.openvino import varying
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe
from memopt.weights.convert import convert


def test_a_product_of_learned_queries_is_no_layer() -> None:
    """Rows that every input has alike depend on the batch's size alone, and are computed once."""
    x = op.parameter([-1, 4], np.float32, name="x")
    count = op.unsqueeze(op.gather(op.shape_of(x), op.constant(0), op.constant(0)), op.constant(0))
    queries = op.broadcast(
        op.constant(np.ones((1, 4), np.float32)),
        op.concat([count, op.constant(np.array([4]))], axis=0),
    )
    learned = op.matmul(queries, op.constant(np.eye(4, dtype=np.float32)), False, True)
    seen = op.matmul(x, op.constant(np.eye(4, dtype=np.float32)), False, True)
    learned.set_friendly_name("learned")
    seen.set_friendly_name("seen")
    model = ov.Model([op.add(learned, seen)], [x])
    assert [linear.label for linear in openvino_linears(model, lambda weight: None)] == ["seen"]
    assert learned.get_name() not in varying(model)


def test_a_product_of_a_transposed_value_is_no_layer() -> None:
    """Its features are not on the last axis, whose length may differ from input to input."""
    x = op.parameter([-1, 4, -1], np.float32, name="x")  # features before frames, as of SEW-D
    weight = op.constant(np.eye(4, dtype=np.float32))
    model = ov.Model([op.matmul(x, weight, True, True)], [x])
    assert openvino_linears(model, lambda weight: None) == []


@pytest.mark.slow
def test_siglip_is_quantized(tmp_path: Path) -> None:
    """Its head asks with learned queries; in integers the plugin could not compile them."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    config = hf.SiglipVisionConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
    )
    source = tmp_path / "source"
    hf.SiglipVisionModel(config).save_pretrained(source)
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
    }
    (source / "preprocessor_config.json").write_text(json.dumps(processor))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    random = np.random.default_rng(0)
    for number in range(24):
        coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 32), Image.BICUBIC).save(pictures / f"{number:02}.png")
    bundle = convert(str(source), tmp_path / "bundle")
    export(bundle, format="openvino")
    quantize(
        bundle.path,
        Samples(calibration=pictures, samples=12, validation_samples=8),
        Recipe(target="openvino"),
    )
    shutil.rmtree(source)
    files = sorted(pictures.iterdir())
    with (
        ArrowEngine(bundle.path, device="openvino", variant="openvino-fp32") as whole,
        ArrowEngine(bundle.path, device="openvino", variant="openvino-int8-static") as rounded,
    ):
        cosines = (whole.encode(files) * rounded.encode(files)).sum(1)
    assert cosines.mean() > 0.98
