"""Folders of pictures and sounds: a vector a file, the broken ones set aside with their reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest
import soundfile
import transformers
from PIL import Image

from memopt import ArrowEngine
from memopt.bundle import Bundle, open_bundle
from memopt.exporters.base import export
from memopt.jobs.embed import embed_job
from memopt.weights.convert import convert

SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def vit() -> tuple[Any, Any]:
    """A small ViT of pictures of 16 x 16."""
    config = transformers.ViTConfig(**SIZE, image_size=16, patch_size=8)
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    return transformers.ViTModel(config), processor


def wav2vec2() -> tuple[Any, Any]:
    """A small wav2vec2 of two convolutions."""
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (5, 4)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = transformers.Wav2Vec2Config(**SIZE, **convolutions, **positions)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    return transformers.Wav2Vec2Model(config), extractor


def picture(path: Path, number: int) -> None:
    """Write a picture of noise, of a size of its own."""
    pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def sound(path: Path, number: int) -> None:
    """Write noise of a length of its own."""
    samples = np.random.default_rng(number).normal(0, 0.1, 8000 + 100 * number)
    soundfile.write(path, samples, 16000)


@pytest.mark.parametrize(
    ("make", "write", "suffix"), [(vit, picture, ".png"), (wav2vec2, sound, ".wav")]
)
def test_a_folder_of_media_is_encoded(make: Any, write: Any, suffix: str, tmp_path: Path) -> None:
    """Into a Lance data set, by two fragments and two workers; the third file is cut short."""
    model, processor = make()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    bundle: Bundle = convert(str(tmp_path / "model"), tmp_path / "bundle")
    export(bundle)
    folder = tmp_path / "media"
    folder.mkdir()
    paths = [folder / f"{number}{suffix}" for number in range(6)]
    for number, path in enumerate(paths):
        write(path, number)
    paths[2].write_bytes(paths[2].read_bytes()[:30])
    report = embed_job(
        str(folder),
        str(tmp_path / "out.lance"),
        bundle.path,
        device="cpu",
        fragment_rows=3,
        workers=2,
    )
    assert (report.rows, report.vectors, report.failures) == (6, 5, 1)
    line = json.loads((tmp_path / "out.lance.job" / "failures.jsonl").read_text())
    assert (line["index"], line["where"]) == (2, str(paths[2]))
    assert "read" in line["reason"] or "decode" in line["reason"], line
    table = lance.dataset(str(tmp_path / "out.lance")).to_table()
    good = [path for path in paths if path != paths[2]]
    assert table["path"].to_pylist() == [str(path) for path in good]
    assert table["index"].to_pylist() == [0, 1, 3, 4, 5]
    with ArrowEngine(open_bundle(bundle.path), device="cpu") as engine:
        expected = engine.encode(good)
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), expected, atol=1e-5)
