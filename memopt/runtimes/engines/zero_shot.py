"""ZeroShotClassifier: pictures by labels of one's own, with both towers of one bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from memopt.bundle import Bundle, open_bundle
from memopt.errors import BundleError, ConfigurationError, InputError
from memopt.runtimes.engine import ArrowEngine
from memopt.runtimes.towers import other_task
from memopt.tasks.classes import Classification, ranked_labels, sigmoid, softmax
from memopt.weights.kinds import FULL_LENGTH
from memopt.weights.locked import unlocked
from memopt.weights.reader import WeightLoader

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What transformers' zero-shot pipeline says of a picture about each label.
HYPOTHESIS = "This is a photo of {}."
_TEXT = "embedding"


class ZeroShotClassifier:
    """Tells which of some labels fits a picture (CLIP, SigLIP and their kin).

    Args:
        path_or_bundle: a bundle of two towers, both exported.
        variant: as of :class:`memopt.ArrowEngine`, of the pictures' tower.
        device, strict, options: as of :class:`memopt.ArrowEngine`, for both towers.

    Raises:
        BundleError: no bundle, or one without a second tower or without a scale of its logits.
        DeviceError: no provider could open a tower.

    >>> ZeroShotClassifier("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    def __init__(
        self,
        path_or_bundle: str | Path | Bundle,
        device: str = "auto",
        variant: str = "auto",
        strict: bool = False,
        **options: Any,
    ) -> None:
        given = path_or_bundle
        bundle = given if isinstance(given, Bundle) else open_bundle(given)
        if other_task(bundle) is None:
            raise BundleError(
                f"{bundle.path} has no second tower for labels (task {bundle.manifest.task}, a "
                f"{bundle.manifest.model_type})",
                fix="convert a model of pictures and texts, such as CLIP, with its tokenizer",
            )
        self._bundle = bundle
        self._scale, self._bias = _scale(bundle)
        self._pictures = ArrowEngine(bundle, device, variant, strict, **options)
        try:
            self._texts = ArrowEngine(bundle, device, "auto", strict, task=_TEXT, **options)
        except BaseException:
            self._pictures.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bundle(self) -> Bundle:
        """The bundle that was opened."""
        return self._bundle

    def close(self) -> None:
        """Free both towers."""
        self._pictures.close()
        self._texts.close()

    def logits(self, images: Any, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the model's ``logits_per_image``, float32 (images, texts).

        Raises:
            InputError: an input that cannot be used, named by its position.
        """
        pictures, labels = self._pictures.encode(images), self._texts.encode(list(texts))
        likeness = np.atleast_2d(pictures) @ labels.T
        return np.asarray(likeness * self._scale + self._bias, np.float32)

    def classify(
        self,
        images: Any,
        labels: Sequence[str],
        *,
        hypothesis: str = HYPOTHESIS,
        top: int | None = None,
    ) -> list[Classification]:
        """Return the labels of each picture, best first, with their scores.

        The scores of a picture add up to one, but for SigLIP, which gives each label its own.

        Args:
            images: as of :meth:`memopt.ArrowEngine.encode`.
            labels: two or more.
            hypothesis: the sentence that a label is put into.
            top: labels a picture; None for all.

        Raises:
            InputError: an input that cannot be used, no label, or no place for it.
        """
        if not labels or isinstance(labels, str):
            raise InputError("no labels to choose among", fix="give two or more")
        if hypothesis.count("{}") != 1:
            raise InputError(f"hypothesis {hypothesis!r} has no place for a label", fix="write {}")
        if top is not None and (type(top) is not int or top < 1):
            raise ConfigurationError(f"top is {top!r}", fix="give 1 or more, or None")
        logits = self.logits(images, [hypothesis.replace("{}", label) for label in labels])
        each = self._bundle.manifest.model_type in FULL_LENGTH
        scores = sigmoid(logits) if each else softmax(logits) if logits.size else logits
        return [ranked_labels(row, labels, top) for row in scores]


def _scale(bundle: Bundle) -> tuple[float, float]:
    """Return what the cosine of a picture and a text is multiplied by, and what is added."""
    with unlocked(bundle) as plain, WeightLoader(plain.weights) as weights:
        names = {name.rpartition(".")[2]: name for name in weights.names()}

        def number(name: str) -> float:
            return float(np.asarray(weights.load(names[name]), np.float64).reshape(-1)[0])

        if "logit_scale" in names:
            bias = number("logit_bias") if "logit_bias" in names else 0.0
            return float(np.exp(number("logit_scale"))), bias
        if "temperature" in names:
            return 1 / number("temperature"), 0.0
    raise BundleError(
        f"{bundle.path} has no logit_scale: how near a picture and a text must be is not known",
        fix="convert the whole model, not one of its towers",
    )
