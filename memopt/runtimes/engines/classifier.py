"""Classifier: labels with scores for texts, pairs of texts, pictures and sounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import BundleError, ConfigurationError, InputError
from memopt.runtimes.task_engine import Engine
from memopt.runtimes.vectors import as_items
from memopt.tasks.classes import (
    Classification,
    label_names,
    label_scores,
    ranked_labels,
    softmax,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What transformers' zero-shot pipeline asks of an NLI model about each label.
HYPOTHESIS = "This example is {}."


class Classifier(Engine):
    """Gives a score to each label of an input.

    Arguments and errors are those of :class:`memopt.runtimes.task_engine.Engine`.

    >>> Classifier("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    tasks = ("text-classification", "image-classification", "audio-classification")

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, in the order of the columns of :meth:`scores`."""
        width = self._chain.backend.dimension
        config = self._bundle.config()
        known = config.get("id2label") or range(config.get("num_labels", 2))
        return label_names(config, width or len(known))

    def scores(
        self, inputs: Any, *, batch_size: int | None = None, show_progress: bool = False
    ) -> NDArray[np.float32]:
        """Return the score of each label, float32 (inputs, labels).

        Args:
            inputs: texts, or pairs of texts (premise, hypothesis); for pictures and sounds as of
                :meth:`memopt.ArrowEngine.encode`.
            batch_size, show_progress: as of :meth:`answers`.

        Raises:
            InputError: an input that cannot be used, named by its position.
            DeviceError: the engine is closed, or no provider is left.
        """
        rows = self.answers(inputs, batch_size=batch_size, show_progress=show_progress)
        if not rows:
            return np.empty((0, len(self.labels)), np.float32)
        return label_scores(np.stack(rows), self._bundle.config())

    def classify(
        self,
        inputs: Any,
        *,
        top: int | None = None,
        labels: Sequence[str] | None = None,
        hypothesis: str = HYPOTHESIS,
        multi_label: bool = False,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> list[Classification]:
        """Return the labels of each input, best first, with their scores.

        Args:
            inputs: as of :meth:`scores`.
            top: labels an input; None for all.
            labels: of one's own, for a model of natural language inference: whether each follows
                from the text decides (Yin et al. 2019, https://arxiv.org/abs/1909.00161).
            hypothesis: the sentence that a label of one's own is put into.
            multi_label: labels of one's own do not exclude each other.
            batch_size, show_progress: as of :meth:`answers`.

        Raises:
            InputError: an input that cannot be used, named by its position, or no label.
            BundleError: labels of one's own, and the model does no inference.
            DeviceError: the engine is closed, or no provider is left.
        """
        if top is not None and (type(top) is not int or top < 1):
            raise ConfigurationError(f"top is {top!r}", fix="give 1 or more, or None")
        how: dict[str, Any] = {"batch_size": batch_size, "show_progress": show_progress}
        if labels is None:
            names = self.labels
            return [ranked_labels(row, names, top) for row in self.scores(inputs, **how)]
        texts = as_items(inputs, self._bundle.manifest.modality)
        rows = self._entailed(texts, labels, hypothesis, multi_label, how)
        return [ranked_labels(row, labels, top) for row in rows]

    def _entailed(
        self,
        texts: Sequence[Any],
        labels: Sequence[str],
        hypothesis: str,
        multi_label: bool,
        how: dict[str, Any],
    ) -> NDArray[np.float32]:
        entailment, contradiction = self._inference_labels()
        if not labels or isinstance(labels, str):
            raise InputError("no labels to choose among", fix="give two or more")
        if hypothesis.count("{}") != 1:
            raise InputError(f"hypothesis {hypothesis!r} has no place for a label", fix="write {}")
        pairs = [(text, hypothesis.replace("{}", label)) for text in texts for label in labels]
        rows = self.answers(pairs, **how)
        shape = (len(texts), len(labels), len(self.labels))
        logits = np.stack(rows).reshape(shape) if rows else np.empty(shape, np.float32)
        if multi_label or len(labels) == 1:
            return softmax(logits[..., [contradiction, entailment]])[..., 1]
        return softmax(logits[..., entailment])

    def _inference_labels(self) -> tuple[int, int]:
        """Return the positions of entailment and contradiction among the labels."""
        lower = [name.lower() for name in self.labels]
        found = [next((i for i, n in enumerate(lower) if n.startswith(w)), None) for w in _NLI]
        if len(lower) == 2 and found[0] is not None:
            found[1] = 1 - found[0]  # entailment or not: the other label stands against it
        if self._bundle.manifest.modality != "text" or None in found:
            raise BundleError(
                f"{self._bundle.path} has the labels {', '.join(self.labels[:5])}: labels of one's "
                "own need a model of natural language inference (entailment, contradiction)",
                fix="leave the labels out",
            )
        return found[0] or 0, found[1] or 0


_NLI = ("entail", "contradict")
