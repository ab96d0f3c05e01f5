"""Encoders of one modality, and the embedders of a store made of them.

An encoder is a thin adapter over ArrowEngine: it checks that the bundle is of the right kind and
says which model made its vectors. Anything else with ``dim``, ``model_id`` and ``encode`` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memopt.bundle import Bundle
from memopt.errors import BundleError, ConfigurationError, InputError
from memopt.joint.model import JOINT_MODALITIES, Encoder
from memopt.memory.model.schema import Content
from memopt.runtimes.engine import ArrowEngine

if TYPE_CHECKING:
    from memopt.joint.layer import JointEmbeddingLayer


class _EngineEncoder:
    modality = ""
    default_dim = 0

    def __init__(
        self, engine: ArrowEngine | Bundle | str | Path, dim: int | None = None, **options: Any
    ) -> None:
        self.engine = engine if isinstance(engine, ArrowEngine) else ArrowEngine(engine, **options)
        manifest = self.engine.bundle.manifest
        if manifest.modality != self.modality:
            raise BundleError(
                f"{self.engine.bundle.path} encodes {manifest.modality}, not {self.modality}",
                fix=f"give a bundle of modality {self.modality}",
            )
        wanted = self.default_dim if dim is None else dim
        if self.engine.dimension != wanted:
            raise ConfigurationError(
                f"{self.engine.bundle.path} gives vectors of {self.engine.dimension} dimensions, "
                f"not {wanted}",
                fix=f"pass dim={self.engine.dimension} and a joint layer of that size",
            )

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.engine.dimension

    @property
    def model_id(self) -> str:
        """Name of the model and the start of the SHA-256 of its float weights.

        Variants of one model (int8, OpenVINO) share it: they were gated on giving its answers.
        """
        return model_id(self.engine.bundle)

    def encode(self, items: Sequence[Any]) -> NDArray[np.float32]:
        """Return float32 (n, dim), one L2-normalised row per item.

        Raises:
            InputError: an item that cannot be used, named by its position.
        """
        return self.engine.encode(list(items))

    def close(self) -> None:
        """Free the session."""
        self.engine.close()


class VisionEncoder(_EngineEncoder):
    """Encoded images to vectors of 512 dimensions (CLIP ViT-B/32), or ``dim``.

    >>> from memopt.runtimes.testing import fake_engine
    >>> VisionEncoder(fake_engine(512, "image")).encode([b"png"]).shape
    (1, 512)
    """

    modality = "image"
    default_dim = 512


class AudioEncoder(_EngineEncoder):
    """Encoded sounds to vectors of 384 dimensions (Whisper tiny's encoder), or ``dim``.

    >>> from memopt.runtimes.testing import fake_engine
    >>> AudioEncoder(fake_engine(384, "audio")).encode([b"wav"]).shape
    (1, 384)
    """

    modality = "audio"
    default_dim = 384


class TextEncoder(_EngineEncoder):
    """Texts to vectors of 384 dimensions (MiniLM), or ``dim``.

    >>> from memopt.runtimes.testing import fake_engine
    >>> TextEncoder(fake_engine(384)).encode(["a red door"]).shape
    (1, 384)
    """

    modality = "text"
    default_dim = 384


class TextEmbedder:
    """The embedder of a store of texts: no joint layer, one encoder.

    >>> from memopt.runtimes.testing import fake_engine
    >>> TextEmbedder(TextEncoder(fake_engine(384))).embed([Content(text="a red door")]).shape
    (1, 384)
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @property
    def model_id(self) -> str:
        """The encoder's."""
        return self.encoder.model_id

    @property
    def dim(self) -> int:
        """The encoder's."""
        return self.encoder.dim

    def embed(self, items: Sequence[Content]) -> NDArray[np.float32]:
        """Return float32 (n, dim), L2-normalised, of each item's text.

        Raises:
            InputError: an item without text; a picture or sound beside a text is not looked at.
        """
        for position, item in enumerate(items):
            if item.text is None:
                raise InputError(
                    f"item {position} has {', '.join(item.modalities) or 'nothing'} and no text",
                    fix="give this store a joint layer: memopt memory train-joint",
                )
        if not items:
            return np.empty((0, self.dim), np.float32)
        return _unit(self.encoder.encode([item.text for item in items]))


class JointEmbedder:
    """Text, pictures and sounds, alone or together, to one space: encoders, then the joint layer.

    Args:
        layer: the trained joint layer.
        vision, audio, text: encoders; one that is absent only matters for content that needs it.

    Raises:
        ConfigurationError: an encoder's dimension or model is not the one the layer was trained on.
    """

    def __init__(
        self,
        layer: JointEmbeddingLayer,
        *,
        vision: Encoder | None = None,
        audio: Encoder | None = None,
        text: Encoder | None = None,
    ) -> None:
        given = {"vision": vision, "audio": audio, "text": text}
        self.layer = layer
        self.encoders: dict[str, Encoder] = {n: e for n, e in given.items() if e is not None}
        if not self.encoders:
            raise ConfigurationError("no encoder given", fix="give vision, audio or text")
        for name, encoder in self.encoders.items():
            _check_encoder(name, encoder, layer.config.dims[name], layer.encoders.get(name))

    @property
    def model_id(self) -> str:
        """The joint layer's, with a hash of the encoders it was trained on."""
        known = self.layer.encoders or {n: e.model_id for n, e in self.encoders.items()}
        joined = "|".join(f"{name}={known[name]}" for name in sorted(known))
        return f"{self.layer.model_id}+{hashlib.sha256(joined.encode()).hexdigest()[:8]}"

    @property
    def dim(self) -> int:
        """Length of a joint vector."""
        return self.layer.dim

    def embed(self, items: Sequence[Content]) -> NDArray[np.float32]:
        """Return joint vectors, float32 (n, dim), L2-normalised, of what each item holds.

        Raises:
            InputError: an item that is empty, cannot be decoded, or needs an encoder that is not
                there.
        """
        if not items:
            return np.empty((0, self.dim), np.float32)
        present = np.array(
            [[getattr(item, name) is not None for name in JOINT_MODALITIES] for item in items]
        )
        vectors = {}
        for column, name in enumerate(JOINT_MODALITIES):
            rows = np.flatnonzero(present[:, column])
            if not len(rows):
                continue
            if name not in self.encoders:
                raise InputError(
                    f"item {rows[0]} has {name}, and there is no {name} encoder",
                    fix=f"give the embedder a {name} encoder",
                )
            encoded = np.zeros((len(items), self.encoders[name].dim), np.float32)
            encoded[rows] = self.encoders[name].encode(
                [getattr(items[r], name) for r in rows.tolist()]
            )
            vectors[name] = encoded
        empty = np.flatnonzero(~present.any(axis=1))
        if len(empty):
            raise InputError(f"item {empty[0]} is empty", fix="give text, vision or audio")
        return self.layer.embed(
            vision=vectors.get("vision"),
            audio=vectors.get("audio"),
            text=vectors.get("text"),
            present=present,
        )


def model_id(bundle: Bundle) -> str:
    """Return ``name@hash`` of a bundle; the hash is of its float weights.

    >>> from memopt.runtimes.testing import fake_engine
    >>> model_id(fake_engine(8).bundle)
    'fake'
    """
    record: Mapping[str, Any] = bundle.manifest.files.get("weights.parquet", {})
    digest = str(record.get("sha256", ""))[:12]
    return f"{bundle.manifest.name}@{digest}" if digest else bundle.manifest.name


def _check_encoder(name: str, encoder: Encoder, dim: int, known: str | None) -> None:
    if encoder.dim != dim:
        raise ConfigurationError(
            f"the {name} encoder gives {encoder.dim} dimensions, the joint layer takes {dim}",
            fix="train a joint layer for this encoder: memopt memory train-joint",
        )
    if known and known != encoder.model_id:
        raise ConfigurationError(
            f"the joint layer was trained on {name} vectors of {known}, not of {encoder.model_id}",
            fix="use that encoder, or train a joint layer for this one",
        )


def _unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    values = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.maximum(lengths, 1e-12), np.float32)
