"""TokenClassifier: the labelled parts of a text, with their characters."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import ConfigurationError
from memopt.registry import nearest
from memopt.runtimes.engines.windowed import WindowedEngine
from memopt.runtimes.vectors import as_items
from memopt.tasks.classes import label_names, softmax
from memopt.tasks.spans import AGGREGATIONS, OUTSIDE, Span, TokenScores, spans_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.runtimes.task_engine import Answers
    from memopt.runtimes.windows import Windows


class TokenClassifier(WindowedEngine):
    """Finds the labelled parts of texts of any length: names, places, parts of speech.

    Arguments and errors are those of :class:`memopt.runtimes.task_engine.Engine`.

    >>> TokenClassifier("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    tasks = ("token-classification",)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, in the order of the model's columns."""
        width = self._chain.backend.dimension
        config = self._bundle.config()
        known = config.get("id2label") or range(config.get("num_labels", 2))
        return label_names(config, width or len(known))

    def tag(
        self,
        inputs: Any,
        aggregation: str = "simple",
        *,
        ignore: Collection[str] = OUTSIDE,
        stride: int | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> list[list[Span]]:
        """Return the spans of each text, in its order; of a text without any none.

        A text longer than the model is cut into windows that overlap. Each token's label is that
        of the window where it is farthest from an edge, so no span ends where a window does.

        Args:
            inputs: texts.
            aggregation: how tokens become spans, as of :func:`memopt.tasks.spans.spans_of`:
                simple, first, max, average, or none for a span a token.
            ignore: labels that are no span.
            stride: tokens that two windows share; None takes 128, of short windows a quarter.
            batch_size, show_progress: as of :meth:`answers`.

        Raises:
            InputError: a text that cannot be used, named by its position.
            ConfigurationError: an unknown aggregation, or a stride that leaves no way on.
            DeviceError: the engine is closed, or no provider is left.
        """
        if aggregation not in AGGREGATIONS:
            fix = nearest(str(aggregation), AGGREGATIONS)
            raise ConfigurationError(f"aggregation {aggregation!r} is not known", fix=fix)
        ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        front, config = self._windows(), self._bundle.config()
        words = aggregation not in ("simple", "none")

        def wanted(windows: Windows) -> list[NDArray[np.intp]]:
            shares = windows.shares()
            return [windows.positions(window, share) for window, share in enumerate(shares)]

        def spans(windows: Windows, rows: Answers) -> list[Span]:
            if not len(windows.ids):
                return []
            scores = softmax(np.concatenate([row for row in rows if len(row)]))
            continues = front.continues(windows) if words else np.zeros(len(scores), bool)
            tokens = TokenScores(windows.text, scores, windows.offsets, continues)
            return spans_of(tokens, label_names(config, scores.shape[1]), aggregation, ignored)

        return self._windowed(
            as_items(inputs, "text"),
            lambda texts: front.windows(texts, stride),
            wanted,
            spans,
            batch_size,
            show_progress,
        )
