"""Images and sounds become the inputs that transformers' own processors make of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import transformers
from PIL import Image

from memopt.bundle import Bundle, Manifest
from memopt.errors import BundleError
from memopt.runtimes.audio import AudioFrontEnd
from memopt.runtimes.batching import UnusableItems
from memopt.runtimes.image import ImageFrontEnd

SIZES = ((300, 200), (224, 224), (100, 333), (500, 260), (28, 28))
RESNET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def bundle(folder: Path, modality: str) -> Bundle:
    manifest = Manifest(
        name="m",
        task=f"{modality}-embedding",
        modality=modality,
        architecture="A",
        model_type="a",
    )
    return Bundle(folder, manifest)


def picture(height: int, width: int) -> Image.Image:
    generator = np.random.default_rng(height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("CLIPImageProcessorPil", {}),
        ("ViTImageProcessorPil", {}),
        ("ViTImageProcessorPil", {"do_normalize": False, "size": {"height": 50, "width": 70}}),
        ("SiglipImageProcessorPil", {}),
        ("BitImageProcessorPil", {"size": {"shortest_edge": 256}, **RESNET}),  # DINOv2
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 90}}),  # crop larger than the image
    ],
)
def test_images_equal_transformers(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit: the same PIL resampling, then the same float32 arithmetic."""
    processor = getattr(transformers, name)(**settings)
    processor.save_pretrained(tmp_path)
    front = ImageFrontEnd(bundle(tmp_path, "image"))
    for height, width in SIZES:
        image = picture(height, width)
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(front.transform(image), expected)


@pytest.fixture
def images(tmp_path: Path) -> ImageFrontEnd:
    transformers.ViTImageProcessorPil().save_pretrained(tmp_path)
    return ImageFrontEnd(bundle(tmp_path, "image"))


def test_paths_bytes_pil_and_arrays_are_the_same_image(
    images: ImageFrontEnd, tmp_path: Path
) -> None:
    """However it is handed over; grey, float and channel-first arrays too."""
    image = picture(60, 40)
    array = np.asarray(image)
    path = tmp_path / "a.png"
    image.save(path)
    items = [path, str(path), path.read_bytes(), image, array, array.transpose(2, 0, 1)]
    items.append(array / np.float32(255))
    (batch,) = images.prepare(items)
    pixels = batch.feed["pixel_values"]
    assert pixels.shape == (7, 3, 224, 224)
    for other in pixels[1:]:
        np.testing.assert_array_equal(other, pixels[0])
    grey = np.arange(784, dtype=np.uint8).reshape(28, 28)
    stacked = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(images.transform(grey), images.transform(stacked))


def test_a_sideways_photo_is_turned(images: ImageFrontEnd) -> None:
    """EXIF orientation 6 means a quarter turn, as transformers' load_image does it."""
    image = picture(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    image.save(data, "png", exif=exif)
    turned = image.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(images.transform(data.getvalue()), images.transform(turned))


def test_unusable_images_are_named(images: ImageFrontEnd, tmp_path: Path) -> None:
    """Each with its position and reason; the good ones are not lost."""
    whole = io.BytesIO()
    picture(60, 40).save(whole, "png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.getvalue()[:2000])
    items = [picture(8, 8), cut, b"no image", tmp_path / "gone.png", np.zeros((2, 2, 9), np.uint8)]
    with pytest.raises(UnusableItems) as caught:
        images.prepare(items)
    reasons = caught.value.reasons
    assert sorted(reasons) == [1, 2, 3, 4]
    assert "cut.png" in reasons[1]
    assert "is not there" in reasons[3]
    assert "(2, 2, 9)" in reasons[4]
    assert images.check(7) == "is int, not a path, bytes, PIL image or array"


def test_a_bundle_without_processor_settings_is_refused(tmp_path: Path) -> None:
    """The missing file is named."""
    with pytest.raises(BundleError, match=r"preprocessor_config\.json is missing"):
        ImageFrontEnd(bundle(tmp_path, "image"))


def wave(samples: int) -> np.ndarray:
    generator = np.random.default_rng(samples)
    sound = generator.standard_normal(samples) * 0.1 * np.sin(np.arange(samples) / 3000)
    return sound.astype(np.float32)


@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_equals_whispers(mels: int, tmp_path: Path) -> None:
    """From 100 samples to more than 30 s: max abs difference below 1e-3 (here about 4e-6)."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=mels)
    extractor.save_pretrained(tmp_path)
    front = AudioFrontEnd(bundle(tmp_path, "audio"), ["input_features"])
    for samples in (100, 16_000, 80_003, 479_999, 500_000):
        sound = wave(samples)
        expected = extractor(sound, sampling_rate=16_000, return_tensors="np")["input_features"][0]
        np.testing.assert_allclose(front.log_mel(sound), expected, atol=1e-4)
    more: dict[str, Any] = {"truncation": False, "padding": "longest", "return_tensors": "np"}
    expected = extractor(sound, sampling_rate=16_000, **more)["input_features"][0]
    np.testing.assert_allclose(front.log_mel(sound, whole=True), expected, atol=1e-4)


def test_wav2vec2_samples_equal_transformers(tmp_path: Path) -> None:
    """Zero mean and unit variance; different lengths never share an unmasked batch."""
    extractor = transformers.Wav2Vec2FeatureExtractor()
    extractor.save_pretrained(tmp_path)
    front = AudioFrontEnd(bundle(tmp_path, "audio"), ["input_values"])
    sounds = [wave(9000), wave(5000), wave(9000)]
    batches = front.prepare(sounds)
    assert [list(batch.rows) for batch in batches] == [[0, 2], [1]]
    for batch in batches:
        for row, values in zip(batch.rows, batch.feed["input_values"], strict=True):
            expected = extractor(sounds[row], sampling_rate=16_000, return_tensors="np")
            np.testing.assert_allclose(values, expected["input_values"][0], atol=1e-6)


@pytest.fixture
def sounds(tmp_path: Path) -> AudioFrontEnd:
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path)
    return AudioFrontEnd(bundle(tmp_path, "audio"), ["input_features"])


def test_files_bytes_and_arrays_are_the_same_sound(sounds: AudioFrontEnd, tmp_path: Path) -> None:
    """Stereo is averaged, integers are scaled, other rates are resampled."""
    tone = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000).astype(np.float32) * 0.5
    path = tmp_path / "a.wav"
    soundfile.write(path, tone, 16_000, subtype="FLOAT")
    expected = sounds.waveform(tone)
    np.testing.assert_array_equal(expected, tone)
    for item in (path, str(path), path.read_bytes(), (tone, 16_000), np.stack([tone, tone])):
        np.testing.assert_allclose(sounds.waveform(item), expected, atol=1e-6)
    integers = (tone * 32767).astype(np.int16)
    np.testing.assert_allclose(sounds.waveform((integers, 16_000)), expected, atol=1e-4)
    low = np.sin(2 * np.pi * 440 * np.arange(8_000) / 8_000).astype(np.float32) * 0.5
    resampled = sounds.waveform((low, 8_000))
    assert resampled.shape == (16_000,)
    np.testing.assert_allclose(resampled[500:-500], tone[500:-500], atol=5e-3)


def test_unusable_sounds_are_named(sounds: AudioFrontEnd) -> None:
    """Noise bytes, silence of no length and NaN."""
    items = [wave(400), b"no wav", np.zeros(0, np.float32), np.array([np.nan], np.float32)]
    with pytest.raises(UnusableItems) as caught:
        sounds.prepare(items)
    assert sorted(caught.value.reasons) == [1, 2, 3]
    assert "NaN" in caught.value.reasons[3]
    assert sounds.check("a.wav") is None
    assert sounds.check(3) is not None
