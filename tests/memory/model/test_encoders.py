"""Encoders are thin: the engine's vectors, the right kind of bundle, the model's name."""

from __future__ import annotations

import numpy as np
import pytest

from memopt.bundle import Bundle
from memopt.errors import BundleError, ConfigurationError, InputError
from memopt.memory.model.encoders import AudioEncoder, TextEmbedder, TextEncoder, VisionEncoder
from memopt.memory.model.schema import Content
from memopt.runtimes.testing import fake_engine


@pytest.mark.parametrize(
    ("kind", "modality", "dim", "item"),
    [
        (VisionEncoder, "image", 512, b"png"),
        (AudioEncoder, "audio", 384, b"wav"),
        (TextEncoder, "text", 384, "text"),
    ],
)
def test_an_encoder_is_its_engine(kind: type, modality: str, dim: int, item: object) -> None:
    """The vectors are those of the engine, of the issue's lengths by default."""
    engine = fake_engine(dim, modality)
    encoder = kind(engine)
    np.testing.assert_array_equal(encoder.encode([item]), engine.encode([item]))
    assert encoder.dim == dim
    other = next(m for m in ("text", "image") if m != modality)
    with pytest.raises(BundleError, match=f"encodes {other}, not {modality}"):
        kind(fake_engine(dim, other))
    with pytest.raises(ConfigurationError, match="gives vectors of 7 dimensions"):
        kind(fake_engine(7, modality))
    assert kind(fake_engine(7, modality), dim=7).dim == 7


def test_minilm_is_named_by_its_weights(minilm: Bundle) -> None:
    """Every variant of a bundle has one model id, and similar texts have similar vectors."""
    first = TextEncoder(minilm, variant="onnx-fp32")
    other = TextEncoder(minilm.path, device="openvino")
    assert first.model_id == other.model_id
    assert minilm.manifest.files["weights.parquet"]["sha256"][:12] in first.model_id
    embedder = TextEmbedder(first)
    cat, kitten, rain = embedder.embed(
        [Content(text=t) for t in ("a cat", "a small kitten", "heavy rain at night")]
    )
    assert cat @ kitten > cat @ rain
    assert np.isclose(np.linalg.norm(cat), 1, atol=1e-5)
    first.close()
    other.close()


def test_a_text_store_takes_text_only() -> None:
    """Content without text is refused with its place; no content gives no rows."""
    embedder = TextEmbedder(TextEncoder(fake_engine(384)))
    with pytest.raises(InputError, match="item 1 has vision and no text"):
        embedder.embed([Content(text="a"), Content(vision=b"png")])
    assert embedder.embed([]).shape == (0, 384)
    assert (embedder.dim, embedder.model_id) == (384, "fake")
