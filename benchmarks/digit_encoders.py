"""Small encoders of written and spoken digits, trained in seconds: what crossmodal.py compares.

They stand where CLIP and Whisper would be: 512 numbers of a picture, 384 of a sound. Both are
trained to name the digit of the training part only, and their last hidden layer is the vector.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch
from PIL import Image
from scipy.signal import resample_poly
from torch import nn
from torch.nn import functional

from memopt.bundle import Bundle, Manifest
from memopt.runtimes.audio import AudioFrontEnd

DATA = Path("../shared/data")
# 8 kHz recordings hold nothing above 4 kHz: of Whisper's 80 bands to 8 kHz the lower 60 remain.
MELS, FRAMES = 60, 140
# Bands and frames are averaged by two: ten words need no finer picture, and it trains faster.


@dataclass(frozen=True)
class Digits:
    """Items of one modality: encoded bytes, and the digit of each."""

    items: list[bytes]
    digits: np.ndarray
    speakers: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> Digits:
        """Return some of the items."""
        speakers = self.speakers[rows] if self.speakers is not None else None
        return Digits([self.items[row] for row in rows], self.digits[rows], speakers)

    def __len__(self) -> int:
        return len(self.items)


def written() -> Digits:
    """Return all pictures as PNG files."""
    table = pq.read_table(DATA / "digits-written.parquet").to_pydict()
    items = []
    for pixels in table["pixels"]:
        file = io.BytesIO()
        Image.frombytes("L", (28, 28), pixels).save(file, "png")
        items.append(file.getvalue())
    return Digits(items, np.array(table["digit"]))


def spoken() -> Digits:
    """Return all takes as WAV files."""
    table = pq.read_table(DATA / "digits-spoken.parquet").to_pydict()
    return Digits(table["wav"], np.array(table["digit"]), np.array(table["speaker"]))


class Pictures(nn.Module):
    """28x28 pictures to 512 numbers."""

    dim = 512

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _conv(1, 32), nn.MaxPool2d(2), _conv(32, 64), nn.MaxPool2d(2), nn.Flatten(),
            nn.Dropout(0.3), nn.Linear(64 * 49, self.dim),
        )  # fmt: skip

    def forward(self, x: Any) -> Any:
        return self.layers(x)

    @staticmethod
    def prepare(items: Sequence[bytes]) -> Any:
        """Return float32 (n, 1, 28, 28), ink 1 and paper 0."""
        arrays = [np.asarray(Image.open(io.BytesIO(item)).convert("L")) for item in items]
        return torch.from_numpy(np.stack(arrays).astype(np.float32)[:, None] / 255)

    @staticmethod
    def vary(x: Any) -> Any:
        """Turn, scale, slant and move every picture a little, and add noise."""
        count = len(x)
        angle = (torch.rand(count) - 0.5) * 0.5
        scale = 1 + (torch.rand(count, 2) - 0.5) * 0.3
        slant = (torch.rand(count) - 0.5) * 0.4
        move = (torch.rand(count, 2) - 0.5) * 0.3
        cos, sin = angle.cos(), angle.sin()
        first = torch.stack([cos * scale[:, 0], -sin + slant, move[:, 0]], 1)
        second = torch.stack([sin, cos * scale[:, 1], move[:, 1]], 1)
        grid = functional.affine_grid(torch.stack([first, second], 1), list(x.shape), False)
        moved = functional.grid_sample(x, grid, align_corners=False)
        return moved + torch.randn(moved.shape) * 0.05


class Sounds(nn.Module):
    """Log-mel spectrograms to 384 numbers."""

    dim = 384

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _conv(1, 32, (1, 2), 5), _conv(32, 64, 2), _conv(64, 96, (1, 2))
        )  # fmt: skip
        # Where on the frequency axis matters, when in time does not.
        self.last = nn.Sequential(nn.Dropout(0.3), nn.Linear(96 * (MELS // 4) * 2, self.dim))

    def forward(self, x: Any) -> Any:
        x = self.layers(x)
        return self.last(torch.cat([x.mean(3).flatten(1), x.amax(3).flatten(1)], 1))

    @staticmethod
    def prepare(items: Sequence[bytes]) -> Any:
        """Return float32 (n, 1, MELS / 2, FRAMES / 2): memopt's own log-mel front end."""
        front = _front()
        return torch.from_numpy(np.stack([features(front, front.waveform(i)) for i in items]))

    @staticmethod
    def vary(x: Any) -> Any:
        """Shift bands (a longer or shorter throat) and frames, and blank a few of both."""
        out = torch.empty_like(x)
        bands = torch.randint(-2, 3, (len(x),)).tolist()
        frames = torch.randint(0, 12, (len(x),)).tolist()
        for row, (band, frame) in enumerate(zip(bands, frames, strict=True)):
            out[row] = x[row].roll((band, frame), (1, 2))
            low = int(torch.randint(0, x.shape[2] - 4, ()))
            out[row, :, low : low + int(torch.randint(0, 5, ()))] = 0
            start = int(torch.randint(0, x.shape[3] - 6, ()))
            out[row, :, :, start : start + int(torch.randint(0, 7, ()))] = 0
        return out + torch.randn(out.shape) * 0.1


def features(front: AudioFrontEnd, wave: np.ndarray) -> np.ndarray:
    """Return float32 (1, MELS / 2, FRAMES / 2), zero mean over the sound's own frames."""
    mel = front.log_mel(wave)[:MELS, :FRAMES]
    used = max(2, min(FRAMES, len(wave) // 160))
    centred = (mel - mel[:, :used].mean()) / (mel[:, :used].std() + 1e-5)
    centred[:, used:] = 0
    return centred.reshape(1, MELS // 2, 2, FRAMES // 2, 2).mean((2, 4)).astype(np.float32)


def louder_slower_noisier(items: Sequence[bytes], copies: int, seed: int) -> list[bytes]:
    """Return ``copies`` variations of every sound: speed 0.8 to 1.25, noise, silence before."""
    generator = np.random.default_rng(seed)
    made = []
    for item in items:
        wave, rate = soundfile.read(io.BytesIO(item), dtype="float32")
        for _ in range(copies):
            varied = resample_poly(wave, 20, int(generator.integers(16, 26)))
            level = np.abs(varied).max() * 10 ** generator.uniform(-3, -1.3)
            varied = varied + generator.normal(0, level, len(varied))
            varied = np.concatenate([np.zeros(int(generator.integers(0, 800))), varied])
            file = io.BytesIO()
            soundfile.write(file, varied / max(1, np.abs(varied).max()), rate, format="WAV")
            made.append(file.getvalue())
    return made


class DigitEncoder:
    """A trained net with the interface of VisionEncoder and AudioEncoder: bytes to vectors."""

    def __init__(self, net: Any) -> None:
        self.net = net.eval()
        digest = hashlib.sha256()
        for value in net.state_dict().values():
            digest.update(value.numpy().tobytes())
        self.model_id = f"{type(net).__name__.lower()}@{digest.hexdigest()[:12]}"
        self.dim = net.dim

    def encode(self, items: Sequence[bytes]) -> np.ndarray:
        """Return float32 (n, dim), L2-normalised."""
        with torch.no_grad():
            parts = [
                self.net(self.net.prepare(items[start : start + 256]))
                for start in range(0, len(items), 256)
            ]
        return functional.normalize(torch.cat(parts), dim=1).numpy()

    def encode_varied(self, items: Sequence[bytes]) -> np.ndarray:
        """Return vectors of randomly varied items, for training what comes after."""
        with torch.no_grad():
            parts = [
                self.net(self.net.vary(self.net.prepare(items[start : start + 256])))
                for start in range(0, len(items), 256)
            ]
        return functional.normalize(torch.cat(parts), dim=1).numpy()


def train(net: Any, data: Digits, epochs: int, on_epoch: Callable[[], None]) -> DigitEncoder:
    """Teach a net to name digits: cross-entropy, AdamW, one cycle of the learning rate."""
    x, y = net.prepare(data.items), torch.from_numpy(data.digits).long()
    head = nn.Linear(net.dim, 10)
    parameters = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-2)
    steps = -(-len(x) // 64) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            # Normalised as it will be used: what counts is the direction.
            vectors = functional.normalize(net(net.vary(x[rows])), dim=1)
            loss = functional.cross_entropy(head(vectors) * 8, y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        on_epoch()
    return DigitEncoder(net)


def _conv(before: int, after: int, stride: Any = 1, size: int = 3) -> nn.Sequential:
    layer = nn.Conv2d(before, after, size, stride, padding=size // 2)
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU())


def _front() -> AudioFrontEnd:
    """Return memopt's front end with Whisper's settings, for sounds of up to 2 seconds."""
    folder = Path(".cache/crossmodal/log-mel")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"feature_extractor_type": "WhisperFeatureExtractor", "chunk_length": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    manifest = Manifest(
        name="log-mel", task="audio-embedding", modality="audio", architecture="", model_type=""
    )
    return AudioFrontEnd(Bundle(folder, manifest), ("input_features",))
