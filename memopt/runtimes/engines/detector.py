"""Detector: the things in a picture, each with a label, a score and a box."""

from __future__ import annotations

from typing import Any

from memopt.errors import BundleError, ConfigurationError
from memopt.runtimes.image import DETECTORS, picture_size, processor_kind
from memopt.runtimes.task_engine import Engine
from memopt.runtimes.vectors import as_items
from memopt.tasks.boxes import Detection, find_boxes
from memopt.tasks.classes import label_names


class Detector(Engine):
    """Finds things in pictures.

    Arguments and errors are those of :class:`memopt.runtimes.task_engine.Engine`.

    >>> Detector("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    tasks = ("object-detection",)

    def detect(
        self,
        images: Any,
        *,
        threshold: float = 0.5,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> list[list[Detection]]:
        """Return what is in each picture; an empty list where nothing is.

        As transformers' ``post_process_object_detection`` gives it for each picture alone, in its
        order: DETR's kind by query, the others by falling score.

        Args:
            images: paths, encoded bytes, PIL images or arrays (height, width, 3).
            threshold: the score that a detection must pass, 0 to 1.
            batch_size, show_progress: as of :meth:`answers`; only pictures that are of one shape
                after resizing go together.

        Raises:
            InputError: a picture that cannot be used, named by its position.
            BundleError: the image processor is of no detector.
            DeviceError: the engine is closed, or no provider is left.
        """
        if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise ConfigurationError(f"threshold is {threshold!r}", fix="give 0 to 1")
        kind = processor_kind(self._bundle)
        if kind not in DETECTORS:
            raise BundleError(
                f"{self._bundle.path}: {kind}ImageProcessor is of no detector",
                fix=f"known: {', '.join(sorted(DETECTORS))}",
            )
        items = as_items(images, "image")
        rows = self.answers(items, batch_size=batch_size, show_progress=show_progress)
        config = self._bundle.config()
        found = []
        for item, row in zip(items, rows, strict=True):
            boxes = find_boxes(row, picture_size(item), kind, threshold)
            names = label_names(config, row.shape[1] - 4)
            labels = [names[number] for number in boxes.classes]
            edges = map(tuple, boxes.corners.tolist())
            found.append(list(map(Detection, labels, boxes.scores.tolist(), edges)))
        return found
