"""The joint layer at run time: vectors of what is present in, one joint vector out, without torch.

The graph was made by ``memopt memory train-joint``; it runs through the same providers and the same
fallback as any other variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from memopt.bundle import Bundle, open_bundle
from memopt.errors import InputError
from memopt.joint.model import JOINT_MODALITIES, JointConfig, read_config
from memopt.runtimes.base import Settings
from memopt.runtimes.fallback import BackendChain, FallbackEvent
from memopt.runtimes.providers import opener
from memopt.runtimes.selection import candidates

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["JointConfig", "JointEmbeddingLayer", "joint_inputs"]

# Rows of one run: at 768 wide the activations of 256 rows stay below 10 MB.
_BATCH = 256


class JointEmbeddingLayer:
    """Maps the vectors of one to three modalities to one joint vector.

    Args:
        bundle: the folder that ``memopt memory train-joint`` wrote, or the opened bundle.
        device: as for ArrowEngine.
        variant: the variant's name, or auto.
        strict: raise instead of falling back to another provider.
        threads: threads of the CPU backends; None takes every core.

    Raises:
        BundleError: no joint layer there, or no graph was exported.
        DeviceError: no provider could open the graph.

    A runnable example is :func:`joint_inputs`; training one is in :mod:`memopt.joint.train`.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        device: str = "auto",
        variant: str = "auto",
        strict: bool = False,
        *,
        threads: int | None = None,
    ) -> None:
        bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        self._bundle = replace(bundle, path=bundle.path.absolute())
        self.config, self.encoders = read_config(self._bundle)
        self._events: list[FallbackEvent] = []
        settings = Settings(threads=threads)
        self._chain = BackendChain(
            candidates(self._bundle, device, variant),
            lambda candidate: opener(candidate.provider)(self._bundle, candidate, settings),
            strict=strict,
            events=self._events,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"JointEmbeddingLayer({str(self._bundle.path)!r} on {self._chain.candidate})"

    @property
    def dim(self) -> int:
        """Length of the joint vector."""
        return self.config.joint

    @property
    def model_id(self) -> str:
        """The name of the layer and the start of the SHA-256 of its weights."""
        digest = self._bundle.manifest.files["weights.parquet"]["sha256"]
        return f"{self._bundle.manifest.name}@{digest[:12]}"

    @property
    def events(self) -> tuple[FallbackEvent, ...]:
        """Every fallback so far, oldest first."""
        return tuple(self._events)

    def device_info(self) -> dict[str, Any]:
        """Return what runs where."""
        used = self._chain.candidate
        info = {"device": used.provider, "variant": used.variant.name}
        return {**info, **self._chain.backend.info()}

    def embed(
        self,
        *,
        vision: NDArray[Any] | None = None,
        audio: NDArray[Any] | None = None,
        text: NDArray[Any] | None = None,
        present: NDArray[Any] | None = None,
    ) -> NDArray[np.float32]:
        """Return joint vectors, float32 (n, joint), L2-normalised.

        Args:
            vision, audio, text: float (n, dim of that modality); None where no row has it.
            present: bool (n, 3), columns vision, audio, text; by default what is given is present
                in every row. What an absent slot holds is never looked at.

        Raises:
            InputError: another shape, a present vector that is not finite or is all zero, or a
                row with nothing present.
        """
        feeds = joint_inputs(self.config, {"vision": vision, "audio": audio, "text": text}, present)
        count = len(feeds["present"])
        if not count:
            return np.empty((0, self.dim), np.float32)
        starts = range(0, count, _BATCH)
        return np.concatenate(
            [self._chain.run({n: v[s : s + _BATCH] for n, v in feeds.items()}) for s in starts]
        )

    def close(self) -> None:
        """Free the session; closing twice is fine."""
        self._chain.close()


def joint_inputs(
    config: JointConfig,
    given: Mapping[str, NDArray[Any] | None],
    present: NDArray[Any] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Check vectors and return the graph's inputs: one array per modality and ``present``.

    Raises:
        InputError: see :meth:`JointEmbeddingLayer.embed`.

    >>> config = JointConfig(vision=2, audio=2, text=2, joint=8, heads=2)
    >>> joint_inputs(config, {"text": np.ones((1, 2))})["present"]
    array([[0., 0., 1.]], dtype=float32)
    """
    arrays = {name: np.asarray(value) for name, value in given.items() if value is not None}
    if not arrays:
        raise InputError("no vectors given", fix="give vision, audio or text")
    counts = {name: len(value) if value.ndim else 0 for name, value in arrays.items()}
    count = next(iter(counts.values()))
    for name, value in arrays.items():
        expected = (count, config.dims[name])
        if value.shape != expected:
            raise InputError(
                f"{name} has shape {value.shape}, not {expected}",
                fix="use the encoders this joint layer was trained with",
            )
    if present is None:
        mask = np.array([[name in arrays for name in JOINT_MODALITIES]] * count, bool)
        mask = mask.reshape(count, len(JOINT_MODALITIES))
    else:
        mask = np.asarray(present).astype(bool)
        if mask.shape != (count, len(JOINT_MODALITIES)):
            raise InputError(f"present has shape {mask.shape}, not {(count, 3)}")
    empty = np.flatnonzero(~mask.any(axis=1))
    if len(empty):
        raise InputError(f"row {empty[0]} has no modality present")
    feeds = {}
    for column, (name, width) in enumerate(config.dims.items()):
        here = mask[:, column]
        values = np.zeros((count, width), np.float32)
        if here.any():
            if name not in arrays:
                raise InputError(f"present says {name}, but no {name} vectors are given")
            kept = np.asarray(arrays[name][here], np.float32)
            bad = np.flatnonzero(~np.isfinite(kept).all(axis=1) | ~kept.any(axis=1))
            if len(bad):
                row = int(np.flatnonzero(here)[bad[0]])
                raise InputError(f"{name} vector {row} is all zero or not finite")
            values[here] = kept
        feeds[name] = values
    feeds["present"] = mask.astype(np.float32)
    return feeds
