"""Models that are not like BERT: their graph computes what transformers answers, or is refused.

The wrapped module is compared before it is traced: tracing is what test_architectures holds.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from memopt.bundle import Bundle, Manifest
from memopt.errors import BundleError, ExportError
from memopt.exporters import base, examples, interface, refusals
from memopt.runtimes.image import _PROCESSORS, ImageFrontEnd, image_shape
from memopt.runtimes.torch_model import LoadedModel, load_model
from memopt.weights.convert import convert

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}


def manifest(model_type: str, task: str = "embedding", pooling: str = "mean") -> Manifest:
    modality = {"image-embedding": "image"}.get(task, "text")
    return Manifest(
        name="m",
        task=task,
        modality=modality,
        architecture="M",
        model_type=model_type,
        pooling=pooling,
    )


def loaded(name: str, config: Any) -> LoadedModel:
    """A seeded random model."""
    torch.manual_seed(1)
    return LoadedModel(
        getattr(hf, name)._from_config(config, attn_implementation="eager").eval(), config, {}
    )


def wrapped(model: LoadedModel, made: Manifest, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What the graph would compute."""
    pooling = "mean" if made.pooling == "none" else made.pooling
    head = replace(model.head, task=made.task, pooling=pooling, normalize=made.normalize)
    model = replace(model, head=head)
    module = interface.wrap(model, made, made.task)
    names = interface.signature(model, made, made.task).inputs
    with torch.no_grad():
        return [o.numpy() for o in module(*[torch.from_numpy(feeds[n]) for n in names])]


@pytest.mark.parametrize("window", [None, 3])
def test_a_decoder_that_is_not_causal_looks_both_ways(window: int | None) -> None:
    """is_causal: false in config.json, with and without a window."""
    extra: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": 1,
    }
    config = hf.Qwen3Config(
        **TEXT, num_key_value_heads=2, head_dim=8, is_causal=False, **(extra if window else {})
    )
    model, made = loaded("Qwen3Model", config), manifest("qwen3")
    feeds = examples.example(
        model, ("input_ids", "attention_mask"), examples.Shape(3, 13, "right"), 1
    )
    right = interface.reference(model, made, "embedding", feeds)
    got = wrapped(model, made, feeds)
    np.testing.assert_allclose(got[1], right["sentence_embedding"], atol=1e-5)
    config.is_causal = True
    causal = interface.reference(model, made, "embedding", feeds)["sentence_embedding"]
    assert np.abs(causal - got[1]).max() > 1e-3


def test_bigbird_attends_in_blocks_where_a_text_is_long_enough() -> None:
    """Below, at and above the length from which it does, and again after a short text."""
    config = hf.BigBirdConfig(
        **TEXT,
        attention_type="block_sparse",
        block_size=4,
        num_random_blocks=1,
        max_position_embeddings=64,
    )
    model, made = loaded("BigBirdModel", config), manifest("big_bird")
    names = ("input_ids", "attention_mask", "token_type_ids")
    for length in (1, 28, 29, 32, 49, 64, 8, 50):
        feeds = examples.example(model, names, examples.Shape(1, length), length)
        right = interface.reference(model, made, "embedding", feeds)
        got = wrapped(model, made, feeds)
        np.testing.assert_allclose(got[0], right["last_hidden_state"], atol=1e-4)
    # In a batch a text has the answer it has alone.
    wide = {n: np.pad(np.concatenate([v, v]), ((0, 0), (0, 9))) for n, v in feeds.items()}
    np.testing.assert_allclose(wrapped(model, made, wide)[1], np.repeat(got[1], 2, 0), atol=1e-5)


def test_every_export_is_checked_at_the_longest_text_once() -> None:
    """All that the position table holds, as far as memory allows."""
    config = hf.BertConfig(**TEXT, max_position_embeddings=512)
    model = LoadedModel(None, config, {})
    assert max(s.length for s in examples.check_shapes(model, "embedding", None)) == 512
    assert max(s.length for s in examples.check_shapes(model, "embedding", 300)) == 300
    assert max(s.length for s in examples.check_shapes(model, "embedding", 40)) == 40
    long = LoadedModel(None, hf.BertConfig(**TEXT, max_position_embeddings=32_768), {})
    longest = max(s.length for s in examples.check_shapes(long, "embedding", 32_768))
    assert 4 * 4 * longest**2 <= examples.LONGEST_SCORES < 4 * 4 * (longest + 1) ** 2
    roberta = hf.RobertaConfig(**TEXT, max_position_embeddings=130)
    shapes = examples.check_shapes(LoadedModel(None, roberta, {}), "embedding", None)
    assert max(s.length for s in shapes) == 128


def test_the_first_patch_is_not_taken_for_the_picture() -> None:
    """Swin has no class token, ConvNeXt no tokens: pooling 'cls' is refused, 'model' is theirs."""
    swin = hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    convnext = hf.ConvNextConfig(image_size=32, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    for name, config in (("SwinModel", swin), ("ConvNextModel", convnext)):
        model = loaded(name, config)
        feeds = examples.example(model, ("pixel_values",), examples.Shape(2, 0), 1)
        bad = manifest(config.model_type, "image-embedding", "cls")
        first = replace(model, head=replace(model.head, pooling="cls"))
        with pytest.raises(ExportError, match=r"no class token|no tokens"):
            interface.reference(first, bad, "image-embedding", feeds)
        made = manifest(config.model_type, "image-embedding", "model")
        with torch.no_grad():
            own = model.module(torch.from_numpy(feeds["pixel_values"])).pooler_output.numpy()
        got = wrapped(model, made, feeds)[1]
        np.testing.assert_allclose(got, own.reshape(2, -1), atol=1e-6)
        assert got.shape[1:] == (config.hidden_size if name == "SwinModel" else 8,)


def test_statistics_of_batch_norm_come_from_the_checkpoint(tmp_path: Path) -> None:
    """Under a head's prefix they were left at 0 and 1, in the reference as in the graph."""
    torch.manual_seed(0)
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    model = hf.ResNetForImageClassification(config).eval()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2.0)
    model.save_pretrained(tmp_path / "source")
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}}
    (tmp_path / "source" / "preprocessor_config.json").write_text(json.dumps(processor))
    bundle = convert(tmp_path / "source", tmp_path / "bundle", task="image-embedding")
    assert bundle.manifest.pooling == "model"
    made = load_model(bundle, "image-embedding")
    feeds = examples.example(made, ("pixel_values",), examples.Shape(2, 0), 1)
    assert feeds["pixel_values"].shape == (2, 3, 32, 32)
    with torch.no_grad():
        own = model.resnet(torch.from_numpy(feeds["pixel_values"])).pooler_output.flatten(1)
    got = wrapped(made, bundle.manifest, feeds)[1]
    np.testing.assert_allclose(got, own.numpy(), rtol=1e-4, atol=1e-4)


def test_a_model_whose_picture_size_nobody_states_is_refused(tmp_path: Path) -> None:
    """One line that says which file would state it."""
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    hf.ResNetModel(config).save_pretrained(tmp_path / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bundle = convert(tmp_path / "source", tmp_path / "bundle")
    with pytest.raises(ExportError, match=r"no image_size.*preprocessor_config"):
        base.export(bundle)


def test_what_a_models_own_code_raises_is_one_line() -> None:
    """Whatever it is, it becomes an ExportError that names the model and the task."""
    model = LoadedModel(None, hf.BertConfig(**TEXT), {})
    with (
        pytest.raises(
            ExportError, match=r"bert cannot be run as embedding.*AssertionError"
        ) as told,
        refusals.refused(model, "embedding"),
    ):
        raise AssertionError("boom")
    # Its own words come with --debug.
    assert "boom" not in str(told.value)
    assert str(told.value.__cause__) == "boom"


def _front(folder: Path, config: dict[str, Any], model_type: str = "clip") -> Bundle:
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return Bundle(folder, manifest(model_type, "image-embedding"))


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"size": {"height": 50, "width": 60}},
    {"size": 64, "crop_size": 48},
    {"do_normalize": False},
    {"crop_pct": 0.8},
    {"rescale_offset": True, "include_top": False},
    {"do_center_crop": True, "crop_size": {"height": 90, "width": 70}},
)


@pytest.mark.parametrize("name", _PROCESSORS)
def test_pictures_are_prepared_as_transformers_does(name: str, tmp_path: Path) -> None:
    """Every class and setting, from a whole file and from one that leaves out what is usual."""
    generator = np.random.default_rng(0)
    sizes = ((90, 60), (40, 111), (224, 224))
    pictures = [
        Image.fromarray(generator.integers(0, 255, (*s, 3)).astype(np.uint8)) for s in sizes
    ]
    see_through = Image.fromarray(generator.integers(0, 255, (60, 50, 4)).astype(np.uint8))
    for settings in SETTINGS:
        if name == "ConvNext" and "height" in str(settings.get("size")):
            continue  # the class refuses it itself
        if name == "RTDetr" and settings.get("size") == 64:
            continue  # and this one a single edge
        processor = getattr(hf, f"{name}ImageProcessorPil")(**settings)
        whole = json.loads(processor.to_json_string())
        for stated in (whole, {**settings, "image_processor_type": f"{name}ImageProcessor"}):
            bundle = _front(tmp_path, stated)
            front = ImageFrontEnd(bundle)
            for picture in (*pictures, *([see_through] if processor.do_convert_rgb else [])):
                want = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])
                got = front.transform(picture)
                np.testing.assert_allclose(got, want, atol=2e-6, err_msg=f"{settings}")
                assert image_shape(bundle) in (None, want.shape)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    """RGBA, grey with alpha, a palette's transparent colour, arrays: as in transformers."""
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[5:15, 5:15] = (200, 30, 30, 255)
    rgba[0, :, 3] = np.arange(20) * 12
    picture = Image.fromarray(rgba)
    palette = picture.quantize(8)
    palette.info["transparency"] = palette.getpixel((10, 0))
    processor = hf.CLIPImageProcessorPil()
    front = ImageFrontEnd(_front(tmp_path, {"image_processor_type": "CLIPImageProcessor"}))
    for item in (picture, picture.convert("LA"), palette, rgba):
        want = np.asarray(processor(item, return_tensors="np")["pixel_values"][0])
        np.testing.assert_allclose(front.transform(item), want, atol=2e-2)
    assert front.transform(picture)[:, 200, 10].min() > 1.9  # white, as CLIP normalises it


def test_a_processor_or_setting_that_is_not_followed_is_named(tmp_path: Path) -> None:
    """Instead of being taken for ViT's."""
    for config, named in (
        ({"image_processor_type": "Siglip2ImageProcessor"}, "Siglip2ImageProcessor"),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "do_pad"),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": {"longest_edge": 9}},
            "longest_edge",
        ),
    ):
        with pytest.raises(BundleError, match=named):
            ImageFrontEnd(_front(tmp_path, config))
