"""Filter banks: transformers' ASTFeatureExtractor to 1e-4, for sounds of every length."""

from __future__ import annotations

import numpy as np
import pytest

from memopt.runtimes.fbank import FilterBank


@pytest.mark.parametrize("seconds", [0.05, 0.5, 1.234, 2.0])
def test_features_are_those_of_transformers(seconds: float) -> None:
    """Shorter than the model's frames, and longer."""
    transformers = pytest.importorskip("transformers")
    generator = np.random.default_rng(0)
    wave = generator.normal(0, 0.1, int(seconds * 16_000)).astype(np.float32)
    settings = {"max_length": 120, "num_mel_bins": 64}
    extractor = transformers.ASTFeatureExtractor(**settings)
    wanted = extractor(wave, sampling_rate=16_000, return_tensors="np")["input_values"][0]
    got = FilterBank(extractor.to_dict())(wave)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_a_sound_shorter_than_a_frame_is_filled_up_with_silence() -> None:
    """One sample is heard as one frame."""
    got = FilterBank({"max_length": 4, "num_mel_bins": 8})(np.ones(1, np.float32))
    assert got.shape == (4, 8)
    assert np.isfinite(got).all()
