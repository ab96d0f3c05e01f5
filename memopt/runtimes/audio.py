"""Sound to model inputs: Whisper's and Kaldi's log-mel features, or wav2vec2's samples."""

from __future__ import annotations

import io
import math
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.bundle import Bundle
from memopt.errors import BundleError
from memopt.extras import require
from memopt.runtimes.batching import MEDIA_BATCH, USUAL, Batch, Budget, decoded, in_order
from memopt.runtimes.fbank import FilterBank
from memopt.runtimes.image import processor_config

if TYPE_CHECKING:
    from numpy.typing import NDArray

_RATE = 16_000
# Samples of raw waveform per batch: 30 s. wav2vec2's first layer keeps 512 floats per 5 samples,
# 400 bytes a sample, so this is about 200 MB.
_SAMPLE_BUDGET = 30 * _RATE
# wav2vec2's convolutions see 400 samples at a time; anything shorter gives no frame at all.
_FEWEST_SAMPLES = 400
# Frames transformed together: their spectra stay in the L2 cache. 30 s take 4 ms instead of 9.
_FRAMES_AT_ONCE = 256
# No recorder goes past it, and resampling takes memory by the rate: a header may say 4 billion.
_HIGHEST = 768_000
_FLOOR = 1e-10  # Whisper clips the mel power here before the logarithm


class AudioFrontEnd:
    """Turns paths, encoded bytes, (samples, rate) pairs and arrays into model inputs.

    Args:
        bundle: where the feature extractor's settings are.
        inputs: the graph's input names; they decide the kind of features.
    """

    def __init__(self, bundle: Bundle, inputs: Sequence[str]) -> None:
        config = processor_config(bundle, "feature_extractor")
        self.rate = int(config.get("sampling_rate", _RATE))
        self._mask = "attention_mask" in inputs
        self._normalize = bool(config.get("do_normalize", "input_values" in inputs))
        self._mel = "input_features" in inputs
        named = str(config.get("feature_extractor_type", ""))
        self._bank = FilterBank(config) if named.startswith("AST") else None
        if self._mel:
            kind = str(config.get("feature_extractor_type", "Whisper"))
            if not kind.startswith("Whisper"):
                raise BundleError(f"{bundle.path}: features of {kind} are not supported")
            self._fft = int(config.get("n_fft", 400))
            self._hop = int(config.get("hop_length", 160))
            self._samples = int(config.get("chunk_length", 30)) * self.rate
            mels = int(config.get("feature_size", 80))
            sparse = require("scipy.sparse", extra="media", why="hear sound")
            # Each frequency is in two filters of 80, so a sparse product is the shorter one; and
            # the threads of a dense one would go on spinning and take the cores from the model:
            # Whisper-tiny then took 80 ms instead of 40 for a sound.
            self._filters = sparse.csr_array(mel_filters(mels, self._fft, self.rate))
            self._window = np.hanning(self._fft + 1)[:-1].astype(np.float32)

    def check(self, item: object) -> str | None:
        """Return why ``item`` cannot be sound, None when it may."""
        if isinstance(item, str | Path | bytes | bytearray | np.ndarray):
            return None
        if isinstance(item, tuple | list) and len(item) == 2:
            samples, rate = item
            if (
                isinstance(samples, np.ndarray)
                and isinstance(rate, numbers.Real)
                and float(rate) > 0
            ):
                return None
        return f"is {type(item).__name__}, not a path, bytes, array or (samples, rate)"

    def chunks(self, items: Sequence[Any]) -> list[NDArray[np.intp]]:
        """Return positions in chunks of one batch each."""
        return in_order(len(items), MEDIA_BATCH)

    def prepare(self, items: Sequence[Any], budget: Budget = USUAL) -> list[Batch]:
        """Decode, resample and transform one chunk."""
        waves = decoded(items, self.waveform, "sound")
        if self._mel:
            return [
                Batch(rows, {"input_features": np.stack([self.log_mel(waves[r]) for r in rows])})
                for rows in in_order(len(waves), budget.batch_size or len(waves))
            ]
        if self._bank is not None:
            features = [self._bank(wave) for wave in waves]
            return [
                Batch(rows, {"input_values": np.stack([features[row] for row in rows])})
                for rows in in_order(len(waves), budget.batch_size or len(waves))
            ]
        return self._raw(waves, budget.batch_size)

    def waveform(self, item: Any) -> NDArray[np.float32]:
        """Return mono float32 samples at the model's rate."""
        return waveform(item, self.rate)

    def log_mel(self, wave: NDArray[np.float32], *, whole: bool = False) -> NDArray[np.float32]:
        """Return Whisper's log-mel features float32 (mels, frames) of a mono waveform.

        Padded with silence or, unless ``whole``, cut to the model's 30 s. Radford et al. 2022,
        section 2.2; numbers as in transformers' WhisperFeatureExtractor.
        """
        length = max(self._samples, len(wave)) if whole else self._samples
        wave = wave[:length]
        if self._normalize:
            wave = _standardize(wave)
        half = self._fft // 2
        padded = np.zeros(length, np.float32)
        padded[: len(wave)] = wave
        reflected = np.pad(padded, half, mode="reflect")
        frames = length // self._hop
        # Frames of pure silence have power 0: only those that touch the sound are computed, and
        # the reflected tail when the sound reaches into it.
        touched = min(frames, -(-(len(wave) + half) // self._hop) + 1)
        windows = np.lib.stride_tricks.sliding_window_view(reflected, self._fft)[:: self._hop]
        features = np.full((self._filters.shape[0], frames), np.log10(_FLOOR), np.float32)
        for start in range(0, touched, _FRAMES_AT_ONCE):
            block = slice(start, min(start + _FRAMES_AT_ONCE, touched))
            spectrum = np.fft.rfft(windows[block] * self._window, axis=1)
            power = spectrum.real**2 + spectrum.imag**2
            mel = np.maximum(self._filters @ power.T, _FLOOR)
            np.log10(mel, out=features[:, block])
        np.maximum(features, features.max() - 8.0, out=features)
        features += 4.0
        features /= 4.0
        return features

    def _raw(self, waves: list[NDArray[np.float32]], batch_size: int | None) -> list[Batch]:
        if self._normalize:
            waves = [_standardize(wave) for wave in waves]
        lengths = np.array([max(len(wave), _FEWEST_SAMPLES) for wave in waves])
        order = np.argsort(-lengths, kind="stable")
        batches = []
        start = 0
        while start < len(order):
            width = int(lengths[order[start]])
            count = batch_size or max(1, _SAMPLE_BUDGET // width)
            rows = order[start : start + count]
            if not self._mask:
                # Without a mask padding would change the answer: only equal lengths go together.
                rows = rows[lengths[rows] == width]
            values = np.zeros((len(rows), width), np.float32)
            mask = np.zeros((len(rows), width), np.int64)
            for line, row in enumerate(rows):
                values[line, : len(waves[row])] = waves[row]
                mask[line, : lengths[row]] = 1
            feed: dict[str, NDArray[Any]] = {"input_values": values}
            if self._mask:
                feed["attention_mask"] = mask
            batches.append(Batch(rows, feed))
            start += len(rows)
        return batches


def waveform(item: Any, rate: int) -> NDArray[np.float32]:
    """Return mono float32 samples at ``rate`` of a path, bytes, an array or (samples, rate).

    Raises:
        ValueError: the samples are no waveform.

    >>> waveform((np.zeros((100, 2), np.int16), 8000), 16000).shape
    (200,)
    """
    samples, own = _decoded(item, rate)
    samples = _as_float(samples)
    if samples.ndim == 2:
        # Channels are the short axis: soundfile has them last, torchaudio first.
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1 or not samples.size:
        raise ValueError(f"samples of shape {samples.shape} are no waveform")
    if not np.isfinite(samples).all():
        raise ValueError("samples hold NaN or infinity")
    if not 1 <= own <= _HIGHEST:
        raise ValueError(f"{own:g} samples a second are no rate; give 1 to {_HIGHEST}")
    if own != rate:
        signal = require("scipy.signal", extra="media", why="resample sound")
        divisor = math.gcd(int(own), rate)
        samples = signal.resample_poly(samples, rate // divisor, int(own) // divisor)
    return np.asarray(samples, np.float32)


def _decoded(item: Any, rate: int) -> tuple[NDArray[Any], float]:
    if isinstance(item, np.ndarray):
        return item, rate
    if isinstance(item, tuple | list):
        return item[0], item[1]
    soundfile = require("soundfile", extra="media", why="read sound files")
    raw = isinstance(item, bytes | bytearray)
    if not raw and not Path(str(item)).exists():
        raise FileNotFoundError(f"there is no file {str(item)!r}")
    source = io.BytesIO(item) if raw else str(item)
    samples, own = soundfile.read(source, dtype="float32")
    return samples, own


def mel_filters(mels: int, fft: int, rate: int) -> NDArray[np.float32]:
    """Return float32 (mels, fft // 2 + 1) triangular filters on Slaney's mel scale, 0 to 8 kHz.

    Slaney, Auditory Toolbox (1998): linear below 1 kHz, logarithmic above, each of unit area.

    >>> mel_filters(80, 400, 16000).shape
    (80, 201)
    """
    highest = 8000.0
    step = math.log(6.4) / 27.0
    top = 15.0 + math.log(highest / 1000.0) / step
    points = np.linspace(0.0, top, mels + 2)
    hertz = np.where(
        points < 15.0, points * 200.0 / 3.0, 1000.0 * np.exp(step * np.maximum(points - 15.0, 0))
    )
    bins = np.linspace(0.0, rate // 2, fft // 2 + 1)
    slopes = hertz[:, None] - bins[None, :]
    widths = np.diff(hertz)
    rising = -slopes[:-2] / widths[:-1, None]
    falling = slopes[2:] / widths[1:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    area = 2.0 / (hertz[2:] - hertz[:-2])
    return (triangles * area[:, None]).astype(np.float32)


def _standardize(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
    return scaled


def _as_float(samples: NDArray[Any]) -> NDArray[np.float32]:
    if np.issubdtype(samples.dtype, np.integer):
        info = np.iinfo(samples.dtype)
        middle = 0 if info.min < 0 else (info.max + 1) // 2  # 8-bit wav is unsigned around 128
        scale = -info.min if info.min < 0 else middle
        return (samples.astype(np.float32) - middle) / np.float32(scale)
    return np.asarray(samples, np.float32)
