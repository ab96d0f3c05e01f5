"""Kaldi's log-mel filter banks as the Audio Spectrogram Transformer hears them, in numpy.

Povey et al. 2011 (Kaldi), ``compute-fbank-feats``; numbers as of transformers' ASTFeatureExtractor
without torchaudio: frames of 25 ms every 10 ms, without their mean, pre-emphasised, Hann window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FRAME, _HOP, _FFT = 400, 160, 512
_EMPHASIS = 0.97
_FLOOR = 1.192092955078125e-07  # float32's epsilon, below which Kaldi takes no logarithm
_LOWEST = 20.0  # Hz
# AudioSet's, Gong et al. 2021 (https://arxiv.org/abs/2104.01778).
_MEAN, _STD = -4.2677393, 4.5689974


class FilterBank:
    """Turns a waveform into float32 (frames, mels), normalised.

    Args:
        config: the feature extractor's settings.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        rate = int(config.get("sampling_rate", 16_000))
        self.frames = int(config.get("max_length", 1024))
        self._filters = kaldi_filters(int(config.get("num_mel_bins", 128)), rate)
        self._window = np.hanning(_FRAME)
        self._normalize = bool(config.get("do_normalize", True))
        self._mean = float(config.get("mean", _MEAN))
        self._std = float(config.get("std", _STD))

    def __call__(self, wave: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the features of mono samples, cut or filled with zeros to the model's frames."""
        # What comes after the last frame is not looked at; a sound shorter than one is filled up.
        wave = wave[: (self.frames - 1) * _HOP + _FRAME]
        padded = np.zeros(max(len(wave), _FRAME))
        padded[: len(wave)] = wave
        frames = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[::_HOP]
        frames = frames - frames.mean(axis=1, keepdims=True)
        before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
        spectrum = np.fft.rfft((frames - _EMPHASIS * before) * self._window, _FFT, axis=1)
        power = np.abs(spectrum.astype(np.complex64)).astype(np.float64) ** 2
        features = np.zeros((self.frames, self._filters.shape[1]), np.float32)
        features[: len(power)] = np.log(np.maximum(_FLOOR, power @ self._filters))
        if self._normalize:
            features = (features - np.float32(self._mean)) / np.float32(self._std * 2)
        return features


def kaldi_filters(mels: int, rate: int) -> NDArray[np.float64]:
    """Return (257, mels) filters, triangles on Kaldi's mel scale, 20 Hz to half the rate.

    >>> kaldi_filters(128, 16000).shape
    (257, 128)
    """
    ends = _mel(np.array([_LOWEST, rate // 2]))
    centres = np.linspace(ends[0], ends[1], mels + 2)
    bins = _mel(rate / _FFT * np.arange(_FFT // 2 + 1))
    slopes = centres[None, :] - bins[:, None]
    widths = np.diff(centres)
    falling, rising = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    return np.maximum(0.0, np.minimum(falling, rising))


def _mel(hertz: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(1127.0 * np.log(1.0 + hertz / 700.0))
